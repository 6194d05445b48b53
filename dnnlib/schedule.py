"""Schedules: values of configuration fields that change with the number of images seen."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

from dnnlib.config import FLOAT32_MAX, TextValue

UNITS = {"k": 10**3, "M": 10**6}
MAX_IMAGES = 10**15
EXAMPLE = "a schedule such as 0.9:0.99@20M"
_NUMBER = r"\d{1,20}(?:\.\d{0,20})?(?:[eE][-+]?\d{1,3})?|\.\d{1,20}(?:[eE][-+]?\d{1,3})?"
_LENGTH = r"@(\d{1,15}(?:\.\d{1,9})?[kM])"
_SCHEDULE = re.compile(rf"({_NUMBER})(?::({_NUMBER}){_LENGTH})?(?:\+warmup{_LENGTH})?(?:\+rsqrt{_LENGTH})?", re.ASCII)


@dataclass(frozen=True)
class Schedule(TextValue):
    """Value v(n) after n images: a cosine burn-in, times a linear warm-up, times a 1/sqrt decay.

        v(n) = burn(n) min(n / warmup, 1) / sqrt(max(n / decay, 1))
        burn(n) = end + (start - end) (1 + cos(pi n / length)) / 2 for n < length, else end

    The burn-in is R3GAN's (Huang et al. 2024), warm-up and decay are EDM2's (Karras et al. 2024). Lengths are numbers
    of images; 0 omits the factor. As text: `0.9:0.99@20M`, `0.01+warmup@1M+rsqrt@512k`.
    """

    start: float
    end: float
    length: int = 0
    warmup: int = 0
    decay: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse START:END@LENGTH or VALUE, then +warmup@LENGTH, then +rsqrt@LENGTH; raises ValueError.

        A length is a number of images with a unit: 500k or 20M.
        """
        found = _SCHEDULE.fullmatch(text)
        if not found or "@" not in text:
            raise ValueError(f"{EXAMPLE} or 0.01+warmup@1M+rsqrt@512k (lengths in images: 500k, 20M)")
        start, end, *lengths = found.groups()
        values = float(start), float(end or start)
        if max(values) > FLOAT32_MAX:
            raise ValueError(f"{EXAMPLE} with values of at most {FLOAT32_MAX:.2g}")
        return cls(*values, *(_parse_images(length) if length else 0 for length in lengths))

    def __str__(self) -> str:
        """Return the text that `parse` converts to this schedule."""
        value = f"{self.start!r}:{self.end!r}@{_format_images(self.length)}" if self.length else f"{self.end!r}"
        warmup = f"+warmup@{_format_images(self.warmup)}" if self.warmup else ""
        return value + warmup + (f"+rsqrt@{_format_images(self.decay)}" if self.decay else "")

    @property
    def numbers(self) -> tuple[float, float]:
        """First and last value, without warm-up and decay, to which the bounds of a field apply."""
        return self.start, self.end

    def at(self, nimg: int) -> float:
        """Return the value after `nimg` images."""
        value = self.end
        if nimg < self.length:
            value += (self.start - self.end) * (1 + math.cos(math.pi * nimg / self.length)) / 2
        if nimg < self.warmup:
            value *= nimg / self.warmup
        if self.decay and nimg > self.decay:
            value /= math.sqrt(nimg / self.decay)
        return value


def value_at(value: float | Schedule, nimg: int) -> float:
    """Return the value of a field that may have a schedule, after `nimg` images."""
    return value.at(nimg) if isinstance(value, Schedule) else value


def _parse_images(text: str) -> int:
    """Parse a number of images such as 500k or 20M. Raises ValueError for less than one image."""
    images = Fraction(text[:-1]) * UNITS[text[-1]]
    if images.denominator != 1 or not 1 <= images <= MAX_IMAGES:
        raise ValueError(f"{EXAMPLE} whose lengths are whole numbers of images, not {text}")
    return int(images)


def _format_images(images: int) -> str:
    """Return a number of images as text, in the largest unit that needs at most three decimals."""
    unit = "M" if images % 1000 == 0 and images >= UNITS["M"] else "k"
    return f"{images / UNITS[unit]:.3f}".rstrip("0").rstrip(".") + unit
