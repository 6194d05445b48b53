"""Measure time and memory of commands on hostile files; print one line of JSON per kind of file.

python benchmarks/bounds.py
python benchmarks/bounds.py --each --only=archives

The files come from tests/test_bounds.py and tests/test_hostile_data.py, some of them enlarged. Each command runs in a
process forked after all imports, so that time and memory are those of the command alone.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import ROOT, emit

sys.path.insert(0, str(ROOT / "tests"))

import test_bounds as bounds
import test_hostile_data as data
from fuzzing import DATA, SNAPSHOT, STATE

import calc_metrics
import dataset_tool
import generate
import legacy
import report
import train
from dnnlib.config import OPTIONS_FILE, to_json
from torch_utils.checkpoint import Checkpoint, write_file
from training.config import read_config
from training.snapshots import snapshot
from training.snapshots.exchange import save_folder

LIMIT_SECONDS = 60
LIMIT_BYTES = 12 << 30  # of address space
PIECE = 1 << 20

Make = Callable[[Path], list[str]]  # writes the file to an empty folder and returns the command's arguments


@dataclass(frozen=True)
class Cost:
    """Time and memory of a command; `peak_mb` is its peak memory minus the peak of --help."""

    exit_code: int
    seconds: float
    peak_mb: float
    last_line: str  # of the output


def cases() -> Iterator[tuple[str, str, click.Command, Make]]:
    """Yield kind, name, command and `Make` function of all inputs."""
    for name, (make, _) in bounds.TORCH_FILES.items():
        yield "snapshots", name, legacy.main, _in_copy(make)
    for name, fields in bounds.GENERATOR.items():
        yield "configurations", name, legacy.main, _with_fields(fields)
    for name, (change, _) in bounds.DOCUMENTS.items():
        yield "folders of safetensors", name, legacy.main, _in_folder(change)
    for name in bounds.NAMES:
        yield "foreign snapshots", name, legacy.main, _foreign(name)
    for name, members in bounds.ARRAYS.items():
        yield "arrays of styles", name, generate.main, _arrays(members)
    for name, config in bounds.CONFIGS.items():
        yield "DINOv2", name, calc_metrics.main, _dinov2(config)
    for name, corrupt in bounds.DAMAGED_RUNS.items():
        yield "options of a run", name, train.main, _corrupt_run(corrupt)
    for name, build in data.BOMBS.items():
        yield "images", name, dataset_tool.main, _source("folder/0.png", build)
    for name, (files, _) in data.PICKLES.items():
        content = gzip.compress(data.tar_of(data.small_cifar(**files)), 1)
        yield "archives", f"pickle: {name}", dataset_tool.main, _source("cifar.tar.gz", partial(bytes, content))
    for name, (tar, _) in data.TARS.items():
        yield "archives", f"tar: {name}", dataset_tool.main, _source("set.tar", partial(bytes, tar))
    for suffix, pack in data.PACKERS.items():
        yield "archives", f"1 GB of zeros: {suffix}", dataset_tool.main, _source(f"set.tar.{suffix}", _zeros(pack))
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield "archives", f"1 GB of zeros: npz {method}", dataset_tool.main, _source("set.npz", _packed(method))
    for name, (file, build, _) in bounds.TABLES.items():
        yield "tables and shards", name, dataset_tool.main, _source(file, build)
    for number, line in enumerate([*data.STATS, "[" + "[]," * (40 * PIECE) + "[]]"]):
        yield "logs of a run", f"stats {number}", report.main, _run({"stats.jsonl": line.encode() + b"\n"})
    for number, line in enumerate(data.RECORDS):
        yield "logs of a run", f"metric {number}", report.main, _run({"metric-swd5k.jsonl": line.encode() + b"\n"})
    for name in ("stats.jsonl", "log.txt", "metric-swd5k.jsonl", "fakes000000.png", OPTIONS_FILE):
        yield "pipes", name, report.main, _run({name: None})
    for name in ("set.tar", "set.npy", "set.npz", "set.zip", "x-images-idx3-ubyte"):
        yield "pipes", name, dataset_tool.main, _source(name, None)


def _in_copy(make: Callable[[Path], Any]) -> Make:
    def write(folder: Path) -> list[str]:
        shutil.copy(SNAPSHOT, folder / "file.pkl")
        make(folder / "file.pkl")
        return ["info", str(folder / "file.pkl")]

    return write


def _with_fields(fields: dict[str, Any]) -> Make:
    def write(folder: Path) -> list[str]:
        content = bounds.payload()
        content["config"]["generator"] |= fields
        write_file(folder / "wide.pkl", snapshot.FORMAT, snapshot.VERSION, content)
        return ["convert", f"--source={folder / 'wide.pkl'}", f"--dest={folder / 'new'}"]

    return write


def _in_folder(change: Callable[[str], str]) -> Make:
    def write(folder: Path) -> list[str]:
        save_folder(folder / "x", snapshot.load_network(SNAPSHOT))
        document = folder / "x" / "config.json"
        document.write_text(change(document.read_text()))
        return ["info", str(folder / "x")]

    return write


def _foreign(name: str) -> Make:
    def write(folder: Path) -> list[str]:
        path = bounds.write_foreign(folder / "x.pkl", {f"synthesis.{name}.proj_weight": torch.zeros(2, 2)})
        return ["convert", f"--source={path}", f"--dest={folder / 'new'}"]

    return write


def _arrays(members: dict[str, bytes]) -> Make:
    def write(folder: Path) -> list[str]:
        with zipfile.ZipFile(folder / "w.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        options = [f"--network={SNAPSHOT}", "--class=0", "--device=cpu", f"--outdir={folder / 'out'}"]
        return [f"--projected-w={folder / 'w.npz'}", *options]

    return write


def _dinov2(config: Any) -> Make:
    def write(folder: Path) -> list[str]:
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_bytes(bounds.safetensors_file("F32", 32))
        options = [f"--network={SNAPSHOT}", f"--data={DATA / 'shapes.zip'}", "--device=cpu"]
        return ["--metrics=fd16_dinov2", f"--detector={folder}", *options]

    return write


def _corrupt_run(corrupt: Callable[[Path], Any]) -> Make:
    def write(folder: Path) -> list[str]:
        run_dir = folder / "00000-run"
        run_dir.mkdir()
        shutil.copy(STATE, run_dir / "training-state-000001.pt")
        options = to_json(read_config(Checkpoint.read(STATE)["config"]))
        (run_dir / OPTIONS_FILE).write_text(json.dumps(options))
        corrupt(run_dir / OPTIONS_FILE)
        return ["-n", f"--data={DATA / 'shapes.zip'}", f"--resume={run_dir}", f"--outdir={folder}", "--device=cpu"]

    return write


def _source(name: str, build: Callable[[], bytes] | None) -> Make:
    """Return a function that writes an image source, or a pipe if `build` is None."""

    def write(folder: Path) -> list[str]:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if build is None:
            os.mkfifo(path)
        else:
            path.write_bytes(build())
        given = path.parent if path.parent != folder else path
        return [f"--source={given}", f"--dest={folder / 'made.zip'}", "--workers=1"]

    return write


def _zeros(pack: Callable[[bytes], bytes]) -> Callable[[], bytes]:
    return lambda: pack(data.FIRST + data.header("other", 1 << 30)) + pack(bytes(PIECE)) * 1024


def _packed(method: int) -> Callable[[], bytes]:
    def build() -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive, archive.open("images.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (1024, 1024, 1024)}
            np.lib.format.write_array_header_1_0(member, header)
            for _ in range(1024):
                member.write(bytes(PIECE))
        return file.getvalue()

    return build


def _run(files: dict[str, bytes | None]) -> Make:
    return lambda folder: [str(data.make_run(folder / "run", files)), f"--outdir={folder / 'report'}"]


def measure(command: click.Command, arguments: list[str], output: Path) -> Cost:
    """Run a command within LIMIT_SECONDS and LIMIT_BYTES."""
    _, _, base = run(command, ["--help"], output)
    start = time.monotonic()
    exit_code, lines, peak = run(command, arguments, output)
    return Cost(
        exit_code=exit_code,
        seconds=round(time.monotonic() - start, 2),
        peak_mb=round((peak - base) / 1024, 1),
        last_line=(lines or [""])[-1],
    )


def run(command: click.Command, arguments: list[str], output: Path) -> tuple[int, list[str], int]:
    """Run a command in a forked process; return exit code (99: a traceback), output lines and peak memory in KiB."""
    pid = os.fork()
    if pid == 0:
        screen = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(screen, 1)
        os.dup2(screen, 2)
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        signal.alarm(LIMIT_SECONDS)
        try:
            command.main(arguments)
        except SystemExit as error:
            sys.stdout.flush()
            os._exit(error.code if isinstance(error.code, int) else 1)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        os._exit(99)
    _, status, usage = os.wait4(pid, 0)
    lines = output.read_text(errors="replace").splitlines()
    exit_code = 99 if any("Traceback" in line for line in lines) else os.waitstatus_to_exitcode(status)
    return exit_code, lines, usage.ru_maxrss


@click.command()
@click.option("--each", is_flag=True, help="Also print a line for each input.")
@click.option("--only", metavar="KIND", help="Measure only inputs of this kind.")
def main(each: bool, only: str | None) -> None:
    """Measure time and memory on hostile files. Exits with 1 if a command raises, is killed or exceeds the limits."""
    torch.set_num_threads(1)
    bad = 0
    for kind, group in itertools.groupby(cases(), key=lambda case: case[0]):
        if only not in (None, kind):
            continue
        costs: list[Cost] = []
        for _, name, command, make in group:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "in").mkdir()
                arguments = make(Path(folder) / "in")
                costs.append(measure(command, arguments, Path(folder) / "output"))
            if each or costs[-1].exit_code not in (0, 1, 2):
                click.echo(json.dumps({"kind": kind, "name": name, **costs[-1].__dict__}))
        bad += sum(cost.exit_code not in (0, 1, 2) for cost in costs)
        codes = sorted({cost.exit_code for cost in costs})
        result = {"benchmark": "bounds", "kind": kind, "inputs": len(costs), "exit_codes": codes}
        worst = {"seconds": max(cost.seconds for cost in costs), "peak_mb": max(cost.peak_mb for cost in costs)}
        emit({**result, **worst}, torch.device("cpu"))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
