"""Conversion of PBM, PGM and PPM files to the binary 8-bit variant, which decodes fast."""

from __future__ import annotations

import re
import warnings

import numpy as np

_NUMBER = rb"(?:\s|#[^\r\n]*+[\r\n])++(\d{1,9})"  # after whitespace and comments; possessive, no backtracking
_SIZE = re.compile(rb"P([1-6])" + _NUMBER + _NUMBER)
_MAXIMUM = re.compile(_NUMBER)
_COMMENT = re.compile(rb"#[^\r\n]*")
_MAX_COMMENTS = 10_000
_SPACE = b" \t\n\v\f\r"
_PIECE = 1 << 20  # samples scaled at a time


def as_bytes(data: bytes, max_pixels: int) -> bytes:
    """Convert a PBM, PGM or PPM file to a binary file with 8 bits or 1 bit per sample.

    Samples of more than 8 bits are scaled to 16 bits and truncated to the upper 8. Raises ValueError for a malformed
    file and for an image of more than `max_pixels`.
    """
    head = _SIZE.match(data)
    if head is None:
        raise ValueError("the width or height is missing")
    kind, width, height = (int(part) for part in head.groups())
    if not 0 < width * height <= max_pixels:
        raise ValueError(f"{width}x{height} pixels in {len(data)} bytes")
    if kind == 4:
        return data
    count = width * height * (3 if kind in (3, 6) else 1)
    if kind in (1, 2, 3) and data.count(b"#") > _MAX_COMMENTS:
        raise ValueError(f"more than {_MAX_COMMENTS} comments")
    if kind == 1:
        bits = _COMMENT.sub(b"", data[head.end() :]).translate(None, _SPACE)[:count]
        if bits.strip(b"01"):
            raise ValueError("text other than 0 and 1")
        black = np.frombuffer(bits, np.uint8).reshape(-1) == ord("1")
        return _binary(width, height, np.where(black, 0, 255), count)
    maximum = _MAXIMUM.match(data, head.end())
    if maximum is None or not 0 < int(maximum[1]) < 65536:
        raise ValueError("the maximum value is not from 1 to 65535")
    if kind in (5, 6) and int(maximum[1]) == 255:
        return data
    samples = _text(data[maximum.end() :]) if kind in (2, 3) else _raw(data, maximum.end() + 1, int(maximum[1]), count)
    return _binary(width, height, _scaled(samples[:count], int(maximum[1])), count)


def _raw(data: bytes, start: int, maximum: int, count: int) -> np.ndarray:
    kind = np.dtype(np.uint8 if maximum < 256 else ">u2")
    return np.frombuffer(data, kind, min(count, max(len(data) - start, 0) // kind.itemsize), start)


def _text(text: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return np.fromstring(_COMMENT.sub(b"", text), np.int64, sep=" ")
        except (DeprecationWarning, ValueError):
            raise ValueError("text other than numbers") from None


def _scaled(samples: np.ndarray, maximum: int) -> np.ndarray:
    """Scale samples from 0..maximum to 0..255."""
    if samples.size and (samples.min() < 0 or samples.max() > maximum):
        raise ValueError(f"values outside of 0..{maximum}")
    new = 255 if maximum < 256 else 65535
    table = (np.arange(maximum + 1) * new * 2 + maximum) // (2 * maximum) // (1 if maximum < 256 else 256)
    pieces = (samples[start : start + _PIECE] for start in range(0, samples.size, _PIECE))
    return np.concatenate([np.zeros(0, np.uint8), *(table.astype(np.uint8)[piece] for piece in pieces)])


def _binary(width: int, height: int, samples: np.ndarray, count: int) -> bytes:
    if samples.size < count:
        raise ValueError(f"{samples.size} values, expected {count}")
    kind = 5 if count == width * height else 6
    return b"P%d\n%d %d\n255\n" % (kind, width, height) + samples.astype(np.uint8).tobytes()
