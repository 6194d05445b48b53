"""Parameters of a request of the browser page."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from urllib.parse import parse_qsl

from dnnlib.config import UserError

MAX_SEED = 2**32 - 1
MAX_IMAGES = 64  # per response
MAX_FIELDS = 30  # of a query


class Query:
    """Parameters of a query string. Each method removes a parameter and returns its value.

    All methods raise UserError, with the name, the value and the remedy.
    """

    def __init__(self, text: str) -> None:
        try:
            pairs = parse_qsl(
                text, keep_blank_values=True, strict_parsing=bool(text), max_num_fields=MAX_FIELDS, errors="strict"
            )
        except ValueError as error:
            raise UserError(f"malformed query: {error}") from None
        self.given = dict(pairs)
        if len(self.given) < len(pairs):
            raise UserError("the query repeats a parameter")

    def __contains__(self, name: str) -> bool:
        return name in self.given

    def text(self, name: str, default: str | None = None) -> str:
        """Return a text; without a default the parameter is required."""
        text = self.given.pop(name, default)
        if text is None:
            raise UserError(f"{name}: is missing")
        return text

    def choice(self, name: str, choices: Collection[str], default: str | None = None) -> str:
        """Return one of `choices`."""
        text = self.text(name, default)
        if text not in choices:
            raise UserError(f"{name}={text}: choose from {', '.join(choices)}")
        return text

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """Return a whole number from `low` to `high`."""
        if default is not None and name not in self.given:
            return default
        return parse_integer(name, self.text(name), low, high)

    def number(self, name: str, limit: float, default: float) -> float:
        """Return a number from -limit to limit."""
        return parse_number(name, self.given.pop(name), limit) if name in self.given else default

    def end(self) -> None:
        """Raise UserError if parameters are left."""
        if self.given:
            raise UserError(f"{', '.join(self.given)}: unknown parameter of this request")


def parse_integer(name: str, text: str, low: int, high: int) -> int:
    """Parse a whole number. Raises UserError if it is outside low..high."""
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or not low <= int(text) <= high:
        raise UserError(f"{name}={text}: must be a whole number from {low} to {high}")
    return int(text)


def parse_number(name: str, text: str, limit: float) -> float:
    """Parse a number. Raises UserError for values outside -limit..limit."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= limit:
        raise UserError(f"{name}={text}: must be a number from {-limit:g} to {limit:g}")
    return value


def parse_sources(name: str, text: str, saved: Collection[str]) -> list[int | str]:
    """Parse seeds and names of saved styles, such as `0-23,proj00`. Raises UserError for more than MAX_IMAGES."""
    found: list[int | str] = []
    for part in text.split(","):
        if part in saved:
            found.append(part)
            continue
        first, _, last = part.partition("-")
        if not re.fullmatch(r"\d{1,18}(-\d{1,18})?", part, re.ASCII):
            known = f", nor a saved style ({', '.join(saved)})" if saved else ""
            raise UserError(f"{name}={text}: {part!r} is neither a seed nor a range such as 0-23{known}")
        seeds = range(parse_integer(name, first, 0, MAX_SEED), parse_integer(name, last or first, 0, MAX_SEED) + 1)
        if not seeds:
            raise UserError(f"{name}={text}: the range {part} runs backwards")
        if len(found) + len(seeds) > MAX_IMAGES:
            raise UserError(f"{name}={text}: has more than {MAX_IMAGES} images")
        found += seeds
    return found
