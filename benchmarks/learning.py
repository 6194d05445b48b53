"""Train several configurations (arms) with the same seeds, and compare them at equal kimg and at equal minutes.

\b
python benchmarks/learning.py benchmarks/questions/what-helps.toml --data=data/cifar10.zip --outdir=runs/what-helps

QUESTION is a TOML file; docs/learning.md describes it. The first --screen seeds suggest which arms are better than
their reference; --confirm fresh seeds decide. A comparison is printed as a line of JSON with Welch's 95 % interval of
the difference of means: an arm is `better` if the interval of its fresh seeds excludes 0. Arms of different lengths are
also compared at their ends.

Trials run side by side, one per core or GPU. Minutes are CPU time of the training steps on a CPU, elapsed time on a
GPU. An interrupted command continues when it is repeated. --outdir then contains laboratory.json with all results,
table.md, a chart for each metric, and the folder of each run; report.py shows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import click
import torch
from common import emit
from question_file import read_question
from trials import TrialRunner

from dnnlib.cli import NameList, Script, option
from dnnlib.config import UserError
from dnnlib.util import FolderLock, import_extra, write_atomically
from metrics.detectors import DetectorSetup, read_detectors
from metrics.registry import check_available, find, resolve
from reporting.drawing import check_matplotlib
from reporting.laboratory import LABORATORY_FILE, Laboratory, Question, read_laboratory
from reporting.laboratory_chart import draw_laboratory
from reporting.laboratory_table import to_markdown
from torch_utils.distributed import choose_device
from torch_utils.misc import available_cores
from training.config import DatasetConfig
from training.resume import open_dataset

FRESH = 100  # first seed of the confirming stage
CONDITION_NAMES = {"data_hash": "dataset", "detector_sha256": "detector", "noise_mode": "--noise-mode"}


@click.command(cls=Script, help=__doc__)
@click.argument("question", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@option("--outdir", metavar="DIR", required=True, type=click.Path(path_type=Path), help="Folder of the laboratory.")
@option("--data", metavar="PATH", required=True, type=click.Path(exists=True, path_type=Path), help="Training dataset.")
@option("--metrics", type=NameList(), help="Metrics; the first one decides. [fid10k_full with a detector, then swd500]")
@option("--detector", "detectors", type=NameList(), default="", metavar="FILE,...",
        help="Feature network or weight file, as in train.py.")  # fmt: skip
@option("--noise-mode", type=click.Choice(["const", "random"]), default="const", show_default=True,
        help="Noise of the generator in metrics, as in calc_metrics.py.")  # fmt: skip
@option("--screen", metavar="N", type=click.IntRange(0, FRESH), default=3, show_default=True,
        help="Seeds of every arm; 0: no screening, all arms are confirmed.")  # fmt: skip
@option("--confirm", metavar="N", type=click.IntRange(min=0), default=5, show_default=True,
        help="Fresh seeds of promising arms and of their references; 0: none.")  # fmt: skip
@option("--arms", type=NameList(), help="Arms to confirm, instead of the promising ones.")
@option("--jobs", metavar="N", type=click.IntRange(min=1), help="Trials side by side. [one per core or GPU]")
@option("--device", help="cpu, cuda or cuda:N. [all GPUs, or the CPU if there is none]")
def main(
    question: Path,
    outdir: Path,
    data: Path,
    metrics: tuple[str, ...] | None,
    detectors: tuple[str, ...],
    noise_mode: str,
    screen: int,
    confirm: int,
    arms: tuple[str, ...] | None,
    jobs: int | None,
    device: str | None,
) -> None:
    check_matplotlib()
    import_extra("scipy.stats", "metrics")
    for name, count in (("screen", screen), ("confirm", confirm)):
        if count == 1:
            raise UserError(f"--{name}=1: an interval needs at least 2 seeds; 0 omits this stage")
    if screen == confirm == 0:
        raise UserError("--screen=0 --confirm=0: no stage remains; specify the seeds of at least one")
    seeds = {"screen": tuple(range(screen)), "confirm": tuple(range(FRESH, FRESH + confirm))}
    setup = read_detectors(detectors)
    names = choose_metrics(metrics, setup, has_detector=bool(detectors))
    asked = read_question(question, metrics=names, seeds=seeds)
    for name in arms or ():
        if name not in asked.arms:
            raise UserError(f"--arms={name}: {question} has no such arm, only {', '.join(asked.arms)}")
    outdir.mkdir(parents=True, exist_ok=True)
    with FolderLock() as lock:
        lock.acquire(outdir)
        expected = expected_conditions(names, setup, data, noise_mode)
        laboratory = open_laboratory(outdir, asked, expected)
        devices, threads = choose_devices(device, jobs)
        options = [*(f"--detector={file}" for file in detectors), f"--noise-mode={noise_mode}"]
        runner = TrialRunner(
            asked, outdir, data.resolve(), options, devices=devices, threads=threads, expected=expected
        )
        laboratory, failures = runner.run(laboratory, [(arm, seed) for seed in seeds["screen"] for arm in asked.arms])
        default = laboratory.promising() if screen else [*asked.arms]
        candidates = default if arms is None else arms
        chosen = dict.fromkeys([*(own for arm in candidates for own in asked.references(arm)), *candidates])
        laboratory, others = runner.run(laboratory, [(arm, seed) for seed in seeds["confirm"] for arm in chosen])
        finish(laboratory, outdir, devices[0])
    if failures or others:
        raise UserError("; ".join([*failures, *others]))


def choose_metrics(requested: tuple[str, ...] | None, setup: DetectorSetup, *, has_detector: bool) -> tuple[str, ...]:
    """Return the recorded names of the metrics. Raises UserError if one is unknown or unavailable, or there is none."""
    if requested is None:
        requested = ("fid10k_full", "swd500") if has_detector else ("swd500",)
    names = tuple(resolve(requested, setup))
    if not names:
        raise UserError("--metrics: specify at least one metric, e.g. swd500")
    for name in names:
        check_available(name, setup)
    return names


def choose_devices(requested: str | None, jobs: int | None) -> tuple[list[torch.device], int]:
    """Return a device for each job, and the number of CPU threads of a job."""
    device = choose_device(requested)
    cores = available_cores()
    if device.type == "cpu":
        jobs = jobs or cores
        return [device] * jobs, max(cores // jobs, 1)
    gpus = [device] if requested else [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    jobs = jobs or len(gpus)
    return [gpus[i % len(gpus)] for i in range(jobs)], max(cores // jobs, 1)


def expected_conditions(
    names: Sequence[str], setup: DetectorSetup, data: Path, noise_mode: str
) -> dict[str, dict[str, str | None]]:
    """Return the dataset, the detector and the noise of each metric, as in its records."""
    dataset = open_dataset(DatasetConfig(path=str(data)))
    roles = {name: find(name, setup)[0].roles for name in names}
    return {
        name: {
            "data_hash": dataset.content_hash,
            "detector_sha256": setup.identity(own[0])["detector_sha256"] if own else None,
            "noise_mode": noise_mode,
        }
        for name, own in roles.items()
    }


def open_laboratory(outdir: Path, question: Question, expected: dict[str, dict[str, str | None]]) -> Laboratory:
    """Return the laboratory in a folder with its question replaced, or a new one.

    Raises UserError if its trials were made with other options, other data, another detector or another kind of noise.
    """
    if not (outdir / LABORATORY_FILE).exists():
        return Laboratory(question=question)
    laboratory = replace(read_laboratory(outdir), question=question)
    for trial in laboratory.trials:
        if trial.arm in question.arms and trial.options != question.options(trial.arm):
            raise UserError(
                f"--outdir={outdir}: arm {trial.arm} was trained with the options {trial.options!r}, and is now "
                f"{question.options(trial.arm)!r}: give the arm another name, or choose another folder"
            )
        for name, conditions in expected.items():
            known = trial.metrics[name].conditions if name in trial.metrics else {}
            for key, value in conditions.items():
                if known.get(key, value) != value:
                    raise UserError(
                        f"--outdir={outdir}: {name} of {trial.arm}, seed {trial.seed}, was computed with another "
                        f"{CONDITION_NAMES[key]}: choose another folder"
                    )
    return laboratory


def finish(laboratory: Laboratory, outdir: Path, device: torch.device) -> None:
    """Print all comparisons, and write the table and the charts."""
    laboratory.check_conditions()
    for metric in laboratory.question.metrics:
        for comparison in laboratory.comparisons(metric):
            emit({"benchmark": "learning", **asdict(comparison)}, device)
        write_atomically(outdir / f"chart-{metric}.png", draw_laboratory(laboratory, metric))
    write_atomically(outdir / "table.md", to_markdown(laboratory).encode())


if __name__ == "__main__":
    main()
