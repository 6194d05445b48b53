"""Sanitizing of untrusted text for the terminal, logs and files: no control characters, no secrets in URLs.

File names, archive member names and server responses can contain anything. `Screen` filters all output of a program;
`public` is for URLs that are recorded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# Control characters of ASCII and Latin-1, Unicode line ends, bidirectional controls, undecodable bytes (surrogates).
_CONTROL = "\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff"
_ANY_CONTROL = re.compile(f"[{_CONTROL}]")
_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")  # colours and cursor moves (ECMA-48), as written by tqdm and W&B
_SCHEME = r"([a-z][a-z0-9+.-]+:[/\\]+|https?:)"  # pathlib reduces the // of a URL to one /
_ADDRESS = re.compile(_SCHEME + r"[^\s\"'<>\\]+", re.IGNORECASE)
_CLOSING = re.compile(r"[:;,.)\]}!]*$")  # punctuation after a URL in a sentence
# Fragments that contain no secret: a checksum, or words such as a section name.
_PLAIN_FRAGMENT = re.compile(r"#(sha256=[0-9a-f]+|[a-z]{1,20}([._-][a-z]{1,20}){0,9})$", re.IGNORECASE)


def printable(text: str) -> str:
    r"""Return a name on one line, with control characters escaped, e.g. \x1b and \u202e.

    Bytes of a file name that are not UTF-8 are escaped as well, e.g. \xff.
    """
    return _ANY_CONTROL.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a surrogate escape of os.fsdecode
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def public(address: str) -> str:
    """Return a URL without user, password, query and fragment, which may be secret; other text unchanged.

    A fragment that is a checksum, `#sha256=...`, or consists of words is kept.
    """
    scheme = re.match(_SCHEME, address, re.IGNORECASE)
    if not scheme:
        return address
    rest = address[scheme.end() :]
    fragment = _PLAIN_FRAGMENT.search(rest)
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    # A / in a password should be encoded as %2F but often is not; the authority then continues after it.
    continues = "@" not in authority and not authority.startswith("[") and re.search(r":\D", authority)
    kept = rest[rest.rfind("@", 0, None if continues else len(authority)) + 1 :]
    return f"{scheme[0]}{re.split(r'[?#]', kept, maxsplit=1)[0]}{fragment[0] if fragment else ''}"


def without_secrets(text: str) -> str:
    """Return text with every URL replaced by its `public` form."""
    return _ADDRESS.sub(_make_public, text)


def _make_public(match: re.Match[str]) -> str:
    closing = _CLOSING.search(match[0])
    end = closing.start() if closing else len(match[0])
    return public(match[0][:end]) + match[0][end:]


def shown(text: str) -> str:
    r"""Return text sanitized for a terminal or a log. Keeps newlines, tabs, and \r at either end, which redraws a line.

    Removes escape sequences that move the cursor or set colours; escapes other control characters as `printable`.
    """
    text = _SEQUENCE.sub("", text)
    body = text.strip("\r")
    before, after = text[: len(text) - len(text.lstrip("\r"))], text[len(text.rstrip("\r")) :] if body else ""
    lines = re.split(r"([\n\t])", without_secrets(body.replace("\r\n", "\n")))
    return before + "".join(part if part in ("\n", "\t") else printable(part) for part in lines) + after


class Screen:
    """Text stream that sanitizes its output with `shown`. It has no `buffer`, so writes cannot bypass it."""

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
    """Wrap sys.stdout and sys.stderr in a `Screen`."""
    sys.stdout, sys.stderr = _guarded(sys.stdout), _guarded(sys.stderr)


@contextmanager
def guarded() -> Iterator[None]:
    """Context manager that applies `guard` to the block."""
    before = sys.stdout, sys.stderr
    guard()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _guarded(stream: Any) -> Any:
    return stream if stream is None or isinstance(stream, Screen) else Screen(stream)
