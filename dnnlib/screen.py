"""Text from outside, on its way to a screen, a log or a file: no control characters, no secrets of addresses.

Names of files, members of archives and the answers of servers can hold anything. `Screen` is where all that a program
prints passes; `public` is for addresses that are recorded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# Of ASCII and of Latin-1, the ends of lines of Unicode, what reverses the direction of writing, and undecodable bytes.
_CONTROL = "\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff"
_ANY_CONTROL = re.compile(f"[{_CONTROL}]")
_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")  # colours and moves of the cursor (ECMA-48), as of tqdm and W&B
_SCHEME = r"([a-z][a-z0-9+.-]+:[/\\]+|https?:)"  # as a path, an address has one / there
_ADDRESS = re.compile(_SCHEME + r"[^\s\"'<>\\]+", re.IGNORECASE)
_CLOSING = re.compile(r"[:;,.)\]}!]*$")  # what follows an address in a sentence
# Fragments that are no secret: a checksum, and words, as of a section of documentation.
_PLAIN_FRAGMENT = re.compile(r"#(sha256=[0-9a-f]+|[a-z]{1,20}([._-][a-z]{1,20}){0,9})$", re.IGNORECASE)


def printable(text: str) -> str:
    r"""Return a name on one line, its control characters as a terminal shows none: \x1b, \u202e.

    So are bytes of the name of a file that are no UTF-8: \xff.
    """
    return _ANY_CONTROL.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # as os.fsdecode shows a byte
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def public(address: str) -> str:
    """Return an address without what may be secret: user and password, query and fragment; other text as it is.

    A fragment that is a checksum, `#sha256=...`, or made of words stays.
    """
    scheme = re.match(_SCHEME, address, re.IGNORECASE)
    if not scheme:
        return address
    rest = address[scheme.end() :]
    fragment = _PLAIN_FRAGMENT.search(rest)
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    # A / in a password should be written as %2F, but often is not: the authority then goes on after it.
    goes_on = "@" not in authority and not authority.startswith("[") and re.search(r":\D", authority)
    kept = rest[rest.rfind("@", 0, None if goes_on else len(authority)) + 1 :]
    return f"{scheme[0]}{re.split(r'[?#]', kept, maxsplit=1)[0]}{fragment[0] if fragment else ''}"


def without_secrets(text: str) -> str:
    """Return a text in which every address is `public`."""
    return _ADDRESS.sub(_make_public, text)


def _make_public(match: re.Match[str]) -> str:
    closing = _CLOSING.search(match[0])
    end = closing.start() if closing else len(match[0])
    return public(match[0][:end]) + match[0][end:]


def shown(text: str) -> str:
    r"""Return what a screen or a log shows of a text: lines, tabs, and \r only at either end, which redraws a line.

    Sequences that move the cursor or set colours are left out; other control characters are `printable`.
    """
    text = _SEQUENCE.sub("", text)
    body = text.strip("\r")
    before, after = text[: len(text) - len(text.lstrip("\r"))], text[len(text.rstrip("\r")) :] if body else ""
    lines = re.split(r"([\n\t])", without_secrets(body.replace("\r\n", "\n")))
    return before + "".join(part if part in ("\n", "\t") else printable(part) for part in lines) + after


class Screen:
    """A stream of text that writes what is `shown`. It has no bytes below it that could be written past it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(shown(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self.stream, name)


def guard() -> None:
    """Let everything that this process prints from now on pass through a `Screen`."""
    sys.stdout, sys.stderr = _guarded(sys.stdout), _guarded(sys.stderr)


@contextmanager
def guarded() -> Iterator[None]:
    """`guard` while active."""
    before = sys.stdout, sys.stderr
    guard()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _guarded(stream: Any) -> Any:
    return stream if stream is None or isinstance(stream, Screen) else Screen(stream)
