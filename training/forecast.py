"""Forecast of a run's time, memory and disk space, from the pace of its first steps."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from math import ceil, prod
from pathlib import Path

import torch

from dnnlib.config import UserError
from torch_utils import distributed
from torch_utils.misc import peak_memory
from training.hooks import Hook, grid_count
from training.saving import capture_snapshot
from training.snapshots import post_hoc
from training.snapshots.snapshot import write_network
from training.training_loop import Trainer, TrainState

GB = 2**30  # bytes, as in the log
LONG_RUN = 2 * 24 * 3600  # seconds on a CPU after which a smaller preset is suggested


class Pace:
    """Wall time of the steps of this process, without image grids, snapshots and metrics.

    The first step also compiles and allocates: it counts only until there is a second one.
    """

    def __init__(self, state: TrainState) -> None:
        self.steps = 0
        self.marks = [(state.step_seconds, state.nimg)]  # at the start, after the first step, and now

    def update(self, state: TrainState) -> None:
        """Add a step."""
        self.steps += 1
        self.marks[min(self.steps, 2) :] = [(state.step_seconds, state.nimg)]

    @property
    def seconds(self) -> float:
        """Seconds measured."""
        return self.marks[-1][0] - self.marks[-2][0]

    @property
    def seconds_per_kimg(self) -> float:
        """Seconds per thousand images."""
        return 1000 * self.seconds / (self.marks[-1][1] - self.marks[-2][1])


class ForecastLine(Hook):
    """Line with the time that training takes, printed once as soon as the pace of the steps is known.

    The pace is that of `STEPS` steps, which contain all lazy regularisers, and of at least `SECONDS` seconds; or that
    of `SLOW_SECONDS`, if steps are slow.
    """

    STEPS, SECONDS, SLOW_SECONDS = 16, 20, 60

    def __init__(self) -> None:
        self.pace: Pace | None = None

    def on_start(self, trainer: Trainer) -> None:
        self.pace = Pace(trainer.state) if distributed.is_main() else None

    def on_step(self, trainer: Trainer) -> None:
        pace = self.pace
        if pace is None:
            return
        pace.update(trainer.state)
        enough = self.SECONDS if pace.steps > self.STEPS else self.SLOW_SECONDS
        if pace.steps > 1 and pace.seconds >= enough:
            self._print(trainer, pace.seconds_per_kimg)
            self.pace = None

    def _print(self, trainer: Trainer, seconds_per_kimg: float) -> None:
        left, preset = kimg_left(trainer), trainer.config.preset
        print(f"Forecast: {describe_time(left, seconds_per_kimg)}", flush=True)
        if trainer.device.type == "cpu" and seconds_per_kimg * left > LONG_RUN and preset != "tiny":
            print(f"The preset {preset} is meant for GPUs. On a CPU, --cfg=tiny trains a small network", flush=True)


class Probe(Hook):
    """Hook that stops training once its pace has been measured: for `ENOUGH` seconds, and for at least one step."""

    ENOUGH = 20.0  # seconds

    def on_start(self, trainer: Trainer) -> None:
        self.pace = Pace(trainer.state)
        self.next = 2  # step at which the pace is read; not each step, since all processes must agree

    def on_step(self, trainer: Trainer) -> None:
        self.pace.update(trainer.state)
        if self.pace.steps == self.next:
            more = distributed.from_main(self._missing)
            self.next += more
            trainer.is_stopped = not more

    def _missing(self) -> int:
        """Return a number of further steps that does not exceed `ENOUGH` seconds by more than a step; 0 if enough."""
        left, measured = self.ENOUGH - self.pace.seconds, self.pace.steps - 1
        return 0 if left <= 0 else min(ceil(left * measured / self.pace.seconds), self.pace.steps)


def measure(trainer: Trainer) -> dict[str, float]:
    """Train for about 20 seconds without writing anything; return what the rest of the run takes.

    Disk space is that of the files that the run adds to its folder, without TensorBoard's. A collective call. Raises
    UserError if the run is complete.
    """
    left, is_new, probe = kimg_left(trainer), not trainer.state.nimg, Probe()
    if not left:
        raise UserError(f"--forecast: the run is complete at kimg {trainer.state.nimg / 1000:g}; give a longer --kimg")
    trainer.hooks = [probe]
    trainer.train()
    pace = probe.pace.seconds_per_kimg
    trainer.stats.gather()
    disk = distributed.from_main(lambda: disk_space(trainer, left, is_new))  # the optimizers now have their moments
    values = {"kimg": left, "kimg_per_hour": 3600 / pace, "hours": pace * left / 3600, "disk_gb": disk / GB}
    peak = peak_memory()
    if peak:
        values["memory_gb"] = peak / GB
    if trainer.device.type == "cuda":
        values["gpu_memory_gb"] = torch.cuda.max_memory_allocated(trainer.device) / GB
    return values


def describe(values: Mapping[str, float]) -> str:
    """Return the result of `measure` as a line."""
    text = describe_time(values["kimg"], 3600 / values["kimg_per_hour"])
    names = {"memory_gb": "memory per process", "gpu_memory_gb": "memory per GPU", "disk_gb": "disk space"}
    return "; ".join([text, *(f"{label} {rounded(values[key])} GB" for key, label in names.items() if key in values)])


def describe_time(kimg: float, seconds_per_kimg: float) -> str:
    """Return the time that a number of images takes at a pace."""
    time, rate = duration(seconds_per_kimg * kimg), rounded(3600 / seconds_per_kimg, 3)
    return f"{rounded(kimg, 4)} kimg: about {time} here ({rate} kimg per hour, without metrics)"


def duration(seconds: float) -> str:
    """Return a duration with two digits of precision: '61 days', '2.1 hours', '34 minutes', '20 seconds'."""
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 1.95 * size:
            return f"{rounded(seconds / size)} {unit}s"
    return f"{seconds:.0f} seconds"


def rounded(value: float, digits: int = 2) -> str:
    """Return a number with at most this many digits of precision, and no exponent: '140', '0.021', '120,000'."""
    return f"{float(f'{value:.{digits}g}'):,.10g}"


def kimg_left(trainer: Trainer) -> float:
    """Return the thousands of images from the current state to the end of the run."""
    return max(trainer.total_nimg - trainer.state.nimg, 0) / 1000


def disk_space(trainer: Trainer, left: float, is_new: bool) -> int:
    """Return the bytes of the snapshots, averages, image grids and kept training states of the next `left` kimg.

    A new run also writes a snapshot before the first step. The files of the current state are written to a temporary
    folder; grids count as uncompressed.
    """
    run, nimg = trainer.config.run, trainer.state.nimg
    with tempfile.TemporaryDirectory() as name:
        snapshot, state, average = (Path(name) / part for part in ("snapshot.pkl", "state.pt", "average.pt"))
        write_network(snapshot, capture_snapshot(trainer))
        trainer.save(state)
        averages = 0
        for sigma in trainer.profiles.averages:
            post_hoc.write(average, post_hoc.capture(trainer.profiles, sigma, nimg, trainer.batch_size))
            averages += average.stat().st_size
        network_size, state_size = snapshot.stat().st_size, state.stat().st_size
    grid_size = grid_count(trainer.dataset.img_shape) * prod(trainer.dataset.img_shape)
    later = ceil(left / run.tick_kimg / run.snapshot_ticks)
    states = min(later, run.keep_last) + (left // run.keep_every if run.keep_every else 0)
    best = network_size + state_size * run.keep_best if run.metrics != () else 0
    return int((is_new + later) * (network_size + grid_size) + later * averages + states * state_size + best)
