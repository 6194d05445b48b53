"""Failing standard streams: scripts end with one line; training continues and logs everything to log.txt."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest

import calc_metrics
import dataset_tool
import demo
import generate
import legacy
import projector
import report
import style_mixing
import train
from dnnlib.cli import Program

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys
import click
from dnnlib.cli import Script, option

@click.command(cls=Script)
@option("--lines", type=int, default=3)
def main(lines):
    for line in range(lines):
        click.echo(f"line {line}")
    print("a warning", file=sys.stderr)

main()
"""
TRAINING = """
import sys
from pathlib import Path
from dnnlib import streams
from dnnlib.util import TeeLog

streams.protect(needs_stdout=False)
with TeeLog(Path(sys.argv[1])):
    for tick in range(1000):
        print(f"tick {tick}", flush=tick % 10 == 0)
    print("a warning", file=sys.stderr)
print("the end", flush=True)
"""


@contextmanager
def failing(kind: str) -> Iterator[int]:
    """Yield a file descriptor on which writes fail: full disk, closed pipe, or closed terminal."""
    if kind == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        other, descriptor = os.pipe() if kind == "pipe" else pty.openpty()
        os.close(other)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def run(
    code: str, *arguments: str, closed: str = "", stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """Run Python code as a program; `closed` are shell redirections that close streams, e.g. `>&-`."""
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, check=False, stdout=stdout, stderr=stderr)


REASONS = {"full": "No space left on device", "pipe": "Broken pipe", "terminal": "Input/output error"}


@pytest.mark.parametrize(
    ("kind", "arguments"), [("full", []), ("terminal", []), ("pipe", ["--lines=100000"]), ("full", ["--help"])]
)
def test_a_failing_output_stream_ends_with_one_line(kind: str, arguments: list[str]) -> None:
    with failing(kind) as descriptor:
        done = run(SCRIPT, *arguments, stdout=descriptor)
    assert done.returncode == 2
    assert done.stderr == f"Error: stdout: cannot be written ({REASONS[kind]})\n"


@pytest.mark.parametrize(
    ("closed", "expected"),
    [
        (">&-", (2, "", "Error: stdout: cannot be written (it is closed)\n")),
        ("2>&-", (0, "line 0\nline 1\nline 2\n", "")),
        (">&- 2>&-", (2, "", "")),
        (">/dev/full 2>/dev/full", (2, "", "")),
    ],
)
def test_scripts_run_with_closed_streams(closed: str, expected: tuple[int, str, str]) -> None:
    done = run(SCRIPT, closed=closed)
    assert (done.returncode, done.stdout, done.stderr) == expected


def test_errors_print_no_traceback_with_stderr_closed() -> None:
    assert run(SCRIPT, "--lines=x", closed="2>&-").returncode == 2


@pytest.mark.parametrize(
    ("kind", "names"),
    [("pipe", ("stdout",)), ("full", ("stdout",)), ("full", ("stderr",)), ("terminal", ("stdout", "stderr"))],
)
def test_training_continues_without_a_stream_and_logs_it_once(
    tmp_path: Path, kind: str, names: tuple[str, ...]
) -> None:
    log = tmp_path / "log.txt"
    with failing(kind) as descriptor:
        stdout, stderr = (descriptor if name in names else subprocess.PIPE for name in ("stdout", "stderr"))
        done = run(TRAINING, str(log), stdout=stdout, stderr=stderr)
    assert done.returncode == 0
    lines = log.read_text().splitlines()
    notes = [f"Warning: {name} failed ({REASONS[kind]}) and is dropped; output goes to {log} only" for name in names]
    assert sorted(line for line in lines if not line.startswith("tick")) == sorted([*notes, "a warning"])
    assert sum(line.startswith("tick") for line in lines) == 1000
    if "stdout" not in names:
        assert done.stdout.endswith("the end\n")
        assert done.stdout.count(notes[0]) == 1
    if "stderr" not in names:
        assert done.stderr == f"{notes[0]}\na warning\n"


def test_a_slow_reader_of_a_non_blocking_pipe_gets_everything() -> None:
    """A non-blocking terminal, set by another program, temporarily refuses output that exceeds the free space."""
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    with subprocess.Popen([sys.executable, "-c", SCRIPT, "--lines=12000"], cwd=ROOT, stdout=sink) as process:
        os.close(sink)
        with open(source) as file:
            lines = file.read().splitlines()
    assert process.returncode == 0
    assert lines == [f"line {i}" for i in range(12_000)]  # 117 KB; a pipe holds 64 KB


def test_every_script_is_protected() -> None:
    scripts: list[click.Command] = [
        module.main
        for module in (calc_metrics, dataset_tool, demo, generate, legacy, projector, report, style_mixing, train)
    ]
    assert all(isinstance(script, Program) for script in scripts)
    assert len(scripts) == sum('__name__ == "__main__"' in path.read_text() for path in ROOT.glob("*.py"))
