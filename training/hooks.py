"""Hooks of the training loop: progress, image grids, snapshots, training states, metrics, logs, traces.

A hook overrides the methods of `Hook` that it needs. The trainer calls hooks on every process; a hook that writes files
checks `is_main`. The hook for metrics is in training/evaluation.py, the hooks for warnings are in training/health.py.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib.util import append_line, format_time, redraw, warn_on_write_error
from torch_utils import distributed
from torch_utils.images import make_grid, save_image, to_uint8
from torch_utils.misc import seed_step
from torch_utils.signals import Signals
from training.dataset import ImageDataset, encode_labels
from training.loggers import Loggers
from training.networks import execution
from training.saving import Saver
from training.training_loop import Tick, Trainer


class Hook:
    """Base class of hooks; every method does nothing by default.

    After a step, hooks are called in order, each with `on_step` and then, if a tick has ended, `on_tick`. A hook can
    therefore use the values that earlier hooks have added to the tick.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Called before the first step of this process, in a new or resumed run."""

    def on_step(self, trainer: Trainer) -> None:
        """Called after each step."""

    def on_tick(self, trainer: Trainer, tick: Tick) -> None:
        """Called at each tick: tick 0 precedes the first step of a new run, and the last tick follows its last step."""

    def on_end(self, trainer: Trainer) -> None:
        """Called when training ends or a hook stops it, in reverse order of hooks. Not called after an error."""


class TickLine(Hook):
    """Progress line per tick; on a terminal, also a progress line that is redrawn between ticks.

    The remaining time is extrapolated from the pace since the program started, which includes image grids, snapshots
    and metrics.
    """

    def __init__(self) -> None:
        self.drawn = time.monotonic()
        self.first_step: tuple[float, int] | None = None  # time and image count after the first step

    def on_step(self, trainer: Trainer) -> None:
        now, nimg = time.monotonic(), trainer.state.nimg
        self.first_step = self.first_step or (now, nimg)
        if distributed.is_main() and sys.stdout.isatty() and now - self.drawn > 0.5:
            rate = (nimg - trainer.tick_nimg_began) / max(now - trainer.tick_began, 1e-9)
            kimg = f"kimg {nimg / 1000:.2f} of {trainer.total_nimg / 1000:g}"
            redraw(f"{kimg}, {rate:.1f} img/s, {self._remaining(trainer)} left", sys.stdout)
            self.drawn = now

    def on_tick(self, trainer: Trainer, tick: Tick) -> None:
        if not distributed.is_main():
            return
        print(self._tick_line(trainer, tick), flush=True)
        for name, count in tick.values.items():
            if name.startswith("Skipped/"):
                phase = name.partition("/")[2]
                print(f"Warning: {count:.0f} updates of {phase} skipped: values were not finite", flush=True)

    def _remaining(self, trainer: Trainer) -> str:
        """Return the estimated remaining time, or '?' until the second step."""
        start, nimg = self.first_step or (0.0, trainer.state.nimg)
        done = trainer.state.nimg - nimg
        left = max(trainer.total_nimg - trainer.state.nimg, 0)
        return format_time((time.monotonic() - start) / done * left) if done else "?"

    def _tick_line(self, trainer: Trainer, tick: Tick) -> str:
        nimg = trainer.state.nimg
        parts = [f"tick {tick.number:<4d} kimg {nimg / 1000:<7g} time {format_time(trainer.state.elapsed):<7s}"]
        pace = tick.values.get("Timing/sec_per_kimg")
        if pace:
            parts.append(f"left {self._remaining(trainer):<7s} sec/kimg {pace:<6.2f}")
        for label, name in (("G", "Loss/G/loss"), ("D", "Loss/D/loss"), ("sign", "Loss/signs/real")):
            if name in tick.stats:
                parts.append(f"{label} {tick.stats[name].mean:<6.4g}")
        parts.append(f"p {tick.values['Progress/augment']:.3f}")
        memory = tick.values.get("Resources/peak_gpu_mem_gb", tick.values.get("Resources/cpu_mem_gb"))
        parts += [] if memory is None else [f"mem {memory:.1f} GB"]
        return "  ".join(parts)


class ImageGrids(Hook):
    """reals.png and fakes_init.png once, fakes<kimg>.png at every snapshot; all grids use the same latents."""

    def __init__(self, run_dir: Path, snapshot_ticks: int, loggers: Loggers) -> None:
        self.run_dir, self.snapshot_ticks, self.loggers = run_dir, snapshot_ticks, loggers

    def on_tick(self, trainer: Trainer, tick: Tick) -> None:
        if not tick.reached(self.snapshot_ticks) or not distributed.is_main():
            return
        name = "fakes_init.png" if tick.is_first else f"fakes{trainer.state.nimg // 1000:06d}.png"
        if tick.is_first:
            self._show("reals", self._real_images(trainer), self.run_dir / "reals.png", trainer)
        self._show("fakes", self._generate(trainer), self.run_dir / name, trainer)

    def _show(self, name: str, images: torch.Tensor, path: Path, trainer: Trainer) -> None:
        grid = make_grid(images)
        with warn_on_write_error():
            save_image(grid, path)
        self.loggers.add_image(f"Images/{name}", grid, trainer.state.nimg)

    def _indices(self, trainer: Trainer) -> torch.Tensor:
        generator = torch.Generator().manual_seed(trainer.config.seed)
        return torch.randint(len(trainer.dataset), [grid_count(trainer.dataset.img_shape)], generator=generator)

    def _real_images(self, trainer: Trainer) -> torch.Tensor:
        return trainer.dataset.images(self._indices(trainer).tolist())

    @torch.no_grad()
    def _generate(self, trainer: Trainer) -> torch.Tensor:
        """Return images of G_ema with the labels of the real images at the same grid positions."""
        G = trainer.ema.module
        indices = self._indices(trainer)
        generator = torch.Generator().manual_seed(trainer.config.seed)
        z = torch.randn([len(indices), trainer.G.z_dim], generator=generator).to(trainer.device)
        c = encode_labels(trainer.dataset.labels[indices].to(trainer.device), trainer.G.c_dim)
        parts = zip(z.split(trainer.batch_gpu), c.split(trainer.batch_gpu), strict=True)
        return torch.cat([to_uint8(G(zs, cs)).cpu() for zs, cs in parts])


def grid_count(img_shape: Sequence[int]) -> int:
    """Return the number of images (C, H, W) in a grid of about 1024 pixels: 8x8 to 16x16."""
    return min(max(1024 // max(img_shape[1:]), 8), 16) ** 2


class Folder(Hook):
    """Hook that restores the run's folder at each tick if the folder was removed (Saver.check_folder)."""

    def __init__(self, saver: Saver) -> None:
        self.saver = saver

    def on_tick(self, trainer: Trainer, tick: Tick) -> None:
        if not tick.is_first:
            self.saver.check_folder(trainer)


class Snapshots(Hook):
    """network-snapshot-<kimg>.pkl and training-state-<kimg>.pt, every `snapshot_ticks` ticks and at the end."""

    def __init__(self, saver: Saver, snapshot_ticks: int) -> None:
        self.saver, self.snapshot_ticks = saver, snapshot_ticks

    def on_tick(self, trainer: Trainer, tick: Tick) -> None:
        self.saver.report(trainer)
        if tick.reached(self.snapshot_ticks):
            self.saver.save(trainer, snapshot=True)

    def on_end(self, trainer: Trainer) -> None:
        distributed.from_main(self.saver.finish)


class Requests(Hook):
    """Hook that writes a training state when a signal requests one, and stops training if the signal requests a stop.

    A request that arrives before the first step is handled after that step: earlier, there is no progress to save.
    """

    def __init__(self, saver: Saver, signals: Signals) -> None:
        self.saver, self.signals = saver, signals

    def on_step(self, trainer: Trainer) -> None:
        if trainer.is_finished:
            return
        request = self.signals.agree(trainer.state.step)
        if request.stop is None and not request.save:
            return
        self.saver.check_folder(trainer)
        trainer.stop_if_failed()  # otherwise the saved state would hide the failure
        self.saver.save(trainer, snapshot=False)
        name = request.stop.name if request.stop else "SIGUSR1"
        if distributed.is_main():
            print(f"{name} at kimg {trainer.state.nimg / 1000:g}: writing a training state", flush=True)
        trainer.is_stopped = request.stop is not None


class Overfitting(Hook):
    """D's logits for training images compared with held-out images (Karras et al. 2020b, eq. 1).

        r_v = (E[D_train] - E[D_holdout]) / (E[D_train] - E[D_generated]),    r_t = E[sign(D_train)]

    0 means no overfitting, 1 complete overfitting. Each mean covers about NUM_IMAGES images, distributed over the
    processes, under the current augmentation. (By contrast, Loss/signs/real is the mean sign over all real images
    since the last tick. If D only compares images, the mean is over signs of logit differences, and r_t is
    meaningless.)
    """

    NUM_IMAGES = 1024

    def __init__(self, holdout: ImageDataset) -> None:
        self.holdout = holdout

    def on_tick(self, trainer: Trainer, tick: Tick) -> None:
        sides = {"train": trainer.dataset, "holdout": self.holdout, "generated": None}
        scores = {name: self._mean_logits(trainer, name, source) for name, source in sides.items()}
        values = {f"Overfitting/score_{name}": score for name, (score, _) in scores.items()}
        values |= {f"Overfitting/sign_{name}": sign for name, (_, sign) in scores.items()}
        train, held_out, generated = (score for score, _ in scores.values())
        values["Overfitting/r_t"] = scores["train"][1]
        if train != generated:
            values["Overfitting/r_v"] = (train - held_out) / (train - generated)
        tick.values.update({name: value for name, value in values.items() if math.isfinite(value)})

    @torch.no_grad()
    def _mean_logits(self, trainer: Trainer, name: str, source: ImageDataset | None) -> tuple[float, float]:
        """Return the mean of D's logits and the mean of their signs over images of `source` in a fixed random order.

        If `source` is None, the images are generated with the labels of training images.
        """
        dataset = source or trainer.dataset
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
        batch, per_round = trainer.batch_gpu, trainer.batch_gpu * distributed.world_size()
        rounds = max(min(self.NUM_IMAGES, len(self.holdout)) // per_round, 1)
        sums = torch.zeros(2, dtype=torch.float64, device=trainer.device)
        for i in range(rounds):
            position = i * per_round + distributed.rank() * batch
            seed_step(trainer.config.seed, f"overfitting {name}", trainer.state.nimg + position)
            indices = order[torch.arange(position, position + batch) % len(order)]
            c = encode_labels(dataset.labels[indices].to(trainer.device), trainer.G.c_dim)
            if source is None:
                z = torch.randn([batch, trainer.G.z_dim], device=trainer.device)
                with execution.using(all_rgb_heads=True):
                    img = trainer.G(z, c, noise_mode="random")
            else:
                img = trainer.gan.repeat_for_rgb_heads(source.images(indices).to(trainer.device).float() / 127.5 - 1)
            logits = trainer.D(trainer.augment(img), c).double()
            sums += torch.stack([logits.sum(), logits.sign().sum()])
        score, sign = (distributed.all_reduce(sums) / (rounds * per_round)).tolist()
        return score, sign


class JsonLog(Hook):
    """stats.jsonl: one line per tick with all values and the mean and standard deviation of every statistic."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "stats.jsonl"

    def on_tick(self, trainer: Trainer, tick: Tick) -> None:
        if not distributed.is_main():
            return
        line: dict[str, Any] = dict(tick.values)
        for name, stat in tick.stats.items():
            mean, std = (x if math.isfinite(x) else None for x in (stat.mean, stat.std))  # JSON has no nan or inf
            line[name] = {"mean": mean, "std": std, "num": stat.count}
        with warn_on_write_error():
            append_line(self.path, json.dumps(line | {"timestamp": time.time()}))


class Log(Hook):
    """Values and means of each tick for TensorBoard and Weights & Biases (training/loggers.py)."""

    def __init__(self, loggers: Loggers) -> None:
        self.loggers = loggers

    def on_tick(self, trainer: Trainer, tick: Tick) -> None:
        means = {name: stat.mean for name, stat in tick.stats.items() if math.isfinite(stat.mean)}
        self.loggers.add(tick.values | means, trainer.state.nimg)


class Profile(Hook):
    """trace.json: a Chrome trace of `steps` training steps after the first WAIT steps, or fewer if the run stops."""

    WAIT = 3

    def __init__(self, run_dir: Path, steps: int) -> None:
        self.path, self.steps, self.done, self.is_written = run_dir / "trace.json", steps, 0, False
        self.profiler: torch.profiler.profile | None = None

    def on_step(self, trainer: Trainer) -> None:
        self.done += 1
        if trainer.is_finished or self.done == self.WAIT + self.steps:
            self._finish()
        elif self.done == self.WAIT:
            self.profiler = torch.profiler.profile(acc_events=True)  # avoids a warning of torch 2.11
            self.profiler.start()

    def on_end(self, trainer: Trainer) -> None:
        self._finish()

    def _finish(self) -> None:
        """Write the trace of the profiled steps, once."""
        if self.is_written:
            return
        self.is_written = True
        if self.profiler is None:
            print(
                "Warning: run.profile_steps: training ended before the steps to profile",
                file=sys.stderr,
                flush=True,
            )
            return
        self.profiler.stop()
        self.profiler.export_chrome_trace(str(self.path))
        self.profiler = None
        if not self.path.exists():  # torch reports the error on stderr and leaves a partial file
            self.path.with_name(f"{self.path.name}.tmp").unlink(missing_ok=True)
            print(f"Warning: {self.path}: cannot be written; training continues", file=sys.stderr, flush=True)
            return
        print(f"Profile of {self.done - self.WAIT} steps: {self.path} (for chrome://tracing)", flush=True)
