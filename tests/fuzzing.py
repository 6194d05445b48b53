"""Hostile input drawn by hypothesis: strategies that corrupt bytes and documents, and checks of the outcome."""

from __future__ import annotations

import io
import signal
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from conftest import PATIENCE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dataset_tool
from dnnlib.config import UserError
from training.dataset import DatasetConfig, ImageDataset

DATA = Path(__file__).parent / "data"
SNAPSHOT, STATE = DATA / "network-snapshot-v1.pkl", DATA / "training-state-v1.pt"


def draws(few: int, many: int) -> pytest.MarkDecorator:
    """Parametrize a test with few examples, and with many examples under the `slow` marker."""
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])


def for_all(examples: int, *strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
    """Call the decorated function immediately with this number of drawn examples."""
    options = settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )

    def call(check: Callable[..., None]) -> None:
        options(given(*strategies)(check))()

    return call


@contextmanager
def time_limit() -> Iterator[None]:
    """Fail if the body of the `with` statement hangs."""

    def fail(*args: object) -> None:
        raise TimeoutError(f"hangs for {PATIENCE} s")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def error_message(function: Callable[[], Any]) -> str | None:
    """Call a function and return the message of its UserError, or None if it succeeds; other errors propagate."""
    try:
        with time_limit():
            function()
    except UserError as error:
        return str(error) or "no message"
    return None


def run(command: click.Command, *arguments: str) -> int:
    """Run a script and return its exit code: 0, or 1 or 2 with a message."""
    with time_limit():
        result = CliRunner().invoke(command, arguments)
    assert result.exit_code in (0, 1, 2), (arguments, result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
    assert "Traceback" not in result.output
    assert result.exit_code == 0 or result.output.strip()
    return result.exit_code


# Corruption of bytes: truncation at one place, and changes of single bytes. Places are fractions of the length.
PLACES = st.floats(0, 1, exclude_max=True)
CORRUPTION = st.tuples(st.none() | PLACES, st.lists(st.tuples(PLACES, st.integers(1, 255)), max_size=6))


def corrupted(data: bytes, damage: tuple[float | None, list[tuple[float, int]]]) -> bytes:
    """Apply a CORRUPTION to bytes."""
    end, flips = damage
    broken = bytearray(data)
    for place, change in flips if data else ():
        broken[int(place * len(broken))] ^= change
    return bytes(broken if end is None else broken[: int(end * len(broken))])


# Values that JSON can represent.
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def with_change(document: Any, path: Sequence[float], value: Any, remove: bool) -> Any:
    """Return a copy of nested dicts and lists with one value replaced or removed.

    `path` selects the value: at each depth, a fraction of the number of keys is the index of the key.
    """
    document = deepcopy(document)
    at = document
    for depth, share in enumerate(path):
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            break
        key = keys[int(share * len(keys))]
        if depth == len(path) - 1 or not isinstance(at[key], (dict, list)):
            if remove and isinstance(at, dict):
                del at[key]
            else:
                at[key] = value
            break
        at = at[key]
    return document


# Arguments of with_change after the document.
CHANGES = (st.lists(PLACES, min_size=1, max_size=5), VALUES, st.booleans())


def zip_bytes(members: Sequence[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in dict(members).items():
            archive.writestr(name, data)
    return buffer.getvalue()


def read_all(path: Path) -> list[str | None]:
    """Read a whole dataset without and with labels, run `dataset_tool.py check`, and return both error messages."""

    def read(with_labels: bool) -> None:
        data = ImageDataset(DatasetConfig(path=str(path), use_labels=with_labels))
        data.check_shapes()
        assert data.images(range(len(data))).shape[1:] == data.img_shape
        assert data.labels.isfinite().all()

    outcome = [error_message(lambda with_labels=with_labels: read(with_labels)) for with_labels in (False, True)]  # type: ignore[misc]
    run(dataset_tool.main, "check", str(path))
    return outcome
