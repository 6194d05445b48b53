"""Lock of a run folder: only one program at a time can use the folder."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import PATIENCE, SMALL

import train
from dnnlib.config import UserError, WriteError
from dnnlib.util import FolderLock

ROOT = Path(__file__).parent.parent
# Lock a folder, fork a child that outlives its parent (as decoding workers do), and wait.
HOLDER = f"""
PATIENCE = {PATIENCE}
import os, sys, time
from pathlib import Path
from dnnlib.util import FolderLock
lock = FolderLock()
lock.acquire(Path(sys.argv[1]))
if os.fork() == 0:
    time.sleep(PATIENCE)
    os._exit(0)
print("locked", flush=True)
time.sleep(PATIENCE)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds the lock of tmp_path."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout
    assert process.stdout.readline() == "locked\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)  # including the forked child
    process.wait(PATIENCE)
    process.stdout.close()


def test_a_folder_is_locked_until_its_process_dies(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with FolderLock() as lock, pytest.raises(UserError, match=rf"in use by .*process {holder.pid} on .*stop it"):
        lock.acquire(tmp_path)
    holder.kill()  # the forked child keeps running
    holder.wait(PATIENCE)
    with FolderLock() as lock:
        lock.acquire(tmp_path)
    assert (tmp_path / FolderLock.NAME).read_text().startswith(f"process {os.getpid()} on ")


def test_a_file_system_without_locks_causes_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with FolderLock() as lock:
        lock.acquire(tmp_path)
    assert f"{tmp_path}: this file system has no locks (No locks available)" in capsys.readouterr().err
    with FolderLock() as lock, pytest.raises(WriteError, match="cannot be written"):
        lock.acquire(tmp_path / "missing")


def test_a_run_active_elsewhere_is_refused(shapes_zip: Path, tmp_path: Path) -> None:
    """The run is unchanged: the log is not truncated although the state is older."""
    short = [*SMALL, "--tick=0.016", "--snap=1", "--metrics=none", "--device=cpu", "--resume=latest"]
    arguments = [f"--outdir={tmp_path}", f"--data={shapes_zip}", *short]
    assert CliRunner().invoke(train.main, [*arguments, "--kimg=0.016"]).exit_code == 0
    (run_dir,) = tmp_path.iterdir()
    with (run_dir / "stats.jsonl").open("a") as log:
        log.write('{"Progress/kimg": 99}\n')
    before = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.name != FolderLock.NAME}
    command = [sys.executable, "-c", HOLDER, str(run_dir)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout
        process.stdout.readline()
        try:
            result = CliRunner().invoke(train.main, [*arguments, "--kimg=0.032"])
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"Error: {run_dir}: in use by another program (process ")
    assert {path.name: path.read_bytes() for path in run_dir.iterdir() if path.name != FolderLock.NAME} == before
    assert CliRunner().invoke(train.main, [*arguments, "--kimg=0.032"]).exit_code == 0
