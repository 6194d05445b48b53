"""Bounded readers of regular files, JSON documents and JSON lines."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest

from dnnlib.config import WriteError
from dnnlib.util import (
    MAX_JSON_DEPTH,
    MAX_LINE_BYTES,
    TeeLog,
    append_line,
    open_regular,
    parse_json,
    read_json,
    read_json_lines,
    read_lines,
    read_metric_records,
    read_regular,
)


def non_regular_files(folder: Path) -> list[Path]:
    """Return a pipe, a link to a pipe, a socket, a device, a link to a device, and a folder."""
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("pipe")
    with tempfile.TemporaryDirectory(dir="/tmp") as short, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{short}/socket")
        os.rename(f"{short}/socket", folder / "socket")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "folder").mkdir()
    return [*(folder / name for name in ("pipe", "link", "socket", "zero", "folder")), Path("/dev/zero")]


def test_non_regular_files_are_refused_without_blocking(tmp_path: Path) -> None:
    for path in non_regular_files(tmp_path):
        for read in (open_regular, read_json, lambda path: read_regular(path, 9), lambda path: list(read_lines(path))):
            with pytest.raises(OSError, match=path.name) as error:
                read(path)
            assert error.value.strerror
        with pytest.raises(WriteError, match=path.name):
            append_line(path, "x")
        with pytest.raises(OSError, match=path.name):
            TeeLog(path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "missing")


def test_regular_files_are_read_and_appended(tmp_path: Path) -> None:
    path = tmp_path / "file"
    append_line(path, "é")
    append_line(path, "2")
    assert read_regular(path, 5) == "é\n2\n".encode()
    with pytest.raises(OSError, match="exceeds the limit of 4 bytes"):
        read_regular(path, 4)
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == "é\n2\n".encode()


@pytest.mark.parametrize(
    "value", [0, -1, 2**63 - 1, -(2**63), 2**64 - 1, 1e308, [[]], {"a": [None, True, "x"]}, "9" * 9999]
)
def test_json_documents_equal_those_of_the_json_module(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value == parse_json(json.dumps(value).encode())


@pytest.mark.parametrize(
    "text",
    [
        "9" * 5000,
        f"[{2**64}]",
        f"[{-(2**63) - 1}]",
        "-" + "9" * 400,
        "[" * 100_000,
        '{"a":' * 100_000,
        "",
        "x",
        b"\xff",
    ],
)
def test_invalid_json_documents_are_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"a":[', "]}"), ('[0,{"a":', "}]")])
def test_deeply_nested_json_is_refused(start: str, end: str) -> None:
    count = MAX_JSON_DEPTH // (len(end))
    parse_json(start * count + "0" + end * count)
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json(start * (count + 1) + "0" + end * (count + 1))


def test_long_lines_are_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a\n" + b"x" * (3 * MAX_LINE_BYTES) + b"\nb\r\n\nlast")
    assert list(read_lines(path)) == [b"a\n", b"x" * MAX_LINE_BYTES, b"b\r\n", b"\n", b"last"]
    path.write_bytes(b"x" * MAX_LINE_BYTES + b"\ny" * 2)
    assert [len(line) for line in read_lines(path)] == [MAX_LINE_BYTES, 2, 1]


def test_json_lines_are_read_as_records(tmp_path: Path) -> None:
    path = tmp_path / "metric-a.jsonl"
    assert list(read_json_lines(path)) == []
    good = [{"results": {"a": 1}}, {"results": {"a": -2.5, "b": 0}, "kimg": None}]
    values: list[Any] = ["x", True, [1], {}, float("nan")]
    bad: list[Any] = [{"results": {"a": value}} for value in values]
    bad += [{"results": {}}, {"results": []}, {"results": None}]
    lines = [json.dumps(record) for record in (good[0], *bad, good[1])]
    path.write_text("\n".join([*lines, "[]", "x", '{"results": {"a": ' + "9" * 5000 + "}}", "[" * 10**5, '{"resu']))
    assert len(list(read_json_lines(path))) == len(good) + len(bad)
    assert list(read_metric_records(path)) == good
