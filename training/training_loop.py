"""Training loop: training state, phases, steps, and the values reported every tick."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dnnlib.config import ConfigError, UserError, to_json
from torch_utils import distributed, kernels
from torch_utils.checkpoint import Checkpoint, digest
from torch_utils.graphs import GraphPool
from torch_utils.misc import peak_memory, seed_step
from torch_utils.stats import Stat, Stats, moments
from torch_utils.timing import Stopwatch
from training.augment.pipe import AdaController
from training.augment.rgb_heads import build_pipe
from training.config import TrainConfig, schedules
from training.dataset import ImageDataset, batches, encode_labels, fits_on_gpu, resident_batches
from training.ema import EMA
from training.loss import GAN
from training.networks import execution
from training.networks.weights import TransformCache
from training.phases import Phase, build_phases, build_updater
from training.power_ema import PowerEMA
from training.regularisers import LogitMeans

if TYPE_CHECKING:
    from training.hooks import Hook

Moments = tuple[tuple[str, ...], Tensor]  # names of statistics, and their moments (names, 3)
MAGNITUDE_HALF_LIFE = 20_000  # images, of the running mean squares of layer inputs (StyleGAN3)
MAX_SECONDS = 1e10  # upper bound of the times of TrainState in a file


@dataclass
class TrainState:
    """Progress of training: real images seen, steps done, and seconds spent, including time before resuming.

    `elapsed` includes metrics and snapshots; `step_seconds`, wall time, and `cpu_seconds`, CPU time of this process, do
    not.
    """

    nimg: int = 0
    step: int = 0
    elapsed: float = 0.0
    step_seconds: float = 0.0
    cpu_seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        counts = [state[name] for name in ("nimg", "step")]
        if not all(isinstance(x, (int, float)) and 0 <= x < 2**62 for x in counts):
            raise ValueError(f"nimg and step are {counts}"[:200])
        self.nimg, self.step = map(int, counts)
        for name in (
            "elapsed",
            "step_seconds",
            "cpu_seconds",
        ):  # for display only, so an implausible value is not an error
            seconds = state.get(name)
            if not isinstance(seconds, (int, float)) or not seconds > 0:  # nan is not > 0
                seconds = 0
            setattr(self, name, float(min(seconds, MAX_SECONDS)))


class Failures:
    """Per phase, the number of steps with non-finite values and the first such step, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.table: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        return self.table

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if any(row.shape != (2,) or row.dtype != torch.int64 for row in state.values()):
            raise ValueError("a failure is a count and a step")
        self.table = {name: row.to(self.device) for name, row in state.items()}

    def note(self, name: str, step: int, is_bad: Tensor) -> None:
        """Record whether a phase failed at a step; `is_bad` is a boolean scalar on the device."""
        row = self.table.setdefault(name, torch.zeros(2, dtype=torch.int64, device=self.device))  # count, first step
        row[1] = torch.where(is_bad & (row[0] == 0), step, row[1])
        row[0] += is_bad

    def collect(self) -> dict[str, tuple[int, int]]:
        """Return (count, first step) of each phase that failed since the last call, and reset the counts."""
        failures = self.peek()
        self.table = {}
        return failures

    def peek(self) -> dict[str, tuple[int, int]]:
        """Return the result of `collect` without resetting the counts."""
        rows = {name: row.tolist() for name, row in self.table.items()}
        return {name: (count, first) for name, (count, first) in rows.items() if count}


@dataclass(frozen=True)
class Tick:
    """Statistics at the end of a tick. `number` counts ticks since the start of the run; 0 is before the first step."""

    number: int
    previous: int
    is_first: bool
    is_last: bool
    stats: dict[str, Stat]
    values: dict[str, float]  # Progress/..., Timing/..., Resources/...

    def reached(self, every: int) -> bool:
        """Return whether this tick is the first, the last, or the first at or after a multiple of `every`."""
        return self.is_first or self.is_last or self.number // every > self.previous // every


class RunningMean(nn.Module):
    """Exponential moving average of batch means, updated with weight `rate`."""

    value: Tensor

    def __init__(self, value: Tensor, rate: float) -> None:
        super().__init__()
        self.register_buffer("value", value)
        self.rate = rate

    def update(self, mean: Tensor, skip: Tensor) -> None:
        """Update with the mean over a global batch unless `skip`, a boolean scalar on the device, is true."""
        self.value.copy_(torch.where(skip, self.value, self.value.lerp(mean.to(self.value.dtype), self.rate)))


def set_arithmetic(config: TrainConfig) -> None:
    """Set process-wide flags: TF32, full-precision reductions, cuDNN benchmark, deterministic algorithms, kernels."""
    kernels.choose(config.run.kernels)
    execution.set_gpu_arithmetic(allow_tf32=config.allow_tf32)
    deterministic = config.run.deterministic
    torch.backends.cudnn.benchmark = config.run.cudnn_benchmark and not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at its first use


class Trainer:
    """Networks, optimizers and all other state of training; `train` runs the steps and calls the hooks."""

    def __init__(self, config: TrainConfig, dataset: ImageDataset, device: torch.device) -> None:
        self.config, self.dataset, self.device = config, dataset, device
        self.batch_size, self.batch_gpu = _batch_sizes(config)
        self.batches_per_step = 2 if config.loss.fresh_reals else 1  # of real images: for D, then for G
        self.total_nimg = round(config.run.total_kimg * 1000)
        self.tick_nimg = max(round(config.run.tick_kimg * 1000), 1)
        self.hooks: Sequence[Hook] = ()
        self.is_stopped = False  # set by a hook to stop training early

        seed_step(config.seed, "init", 0)
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.G: Any = config.generator.build().to(device).to(memory_format=memory_format)
        self.D: Any = config.discriminator.build().to(device).to(memory_format=memory_format)
        self.ema = EMA(self.G, config.ema)
        self.profiles = PowerEMA(self.G, config.ema.profiles, run_id(config))
        self.augment = build_pipe(config.augment, dataset.img_shape, config.generator.num_rgb_heads).to(device)
        self.ada = AdaController(config.augment, self.augment)
        self.pl_mean = RunningMean(torch.zeros([], device=device), config.loss.pl_decay)
        self.w_avg = RunningMean(self.G.mapping.w_avg, config.w_avg_rate)
        self._build_phases()
        self.transforms = TransformCache()
        self.execution = execution.Execution(
            transforms=self.transforms,
            reduced=execution.REDUCED[config.precision],
            min_grid=config.reduced_from,
            recompute=config.run.recompute,
            random_noise=True,
            attention=config.run.attention,
            shared_styles=True,
        )
        self.graphs: GraphPool[Moments] | None = GraphPool() if config.run.graphs else None

        self.state = TrainState()
        self.stats = Stats(device)
        self.failures = Failures(device)
        self.last_snapshot: Path | None = None  # named in error messages
        self.stopwatch = Stopwatch(device)
        self.trackers = self._build_trackers()
        self.checkpoint = Checkpoint(
            G=self.G,
            D=self.D,
            G_ema=self.ema.module,
            profiles=self.profiles,
            g_optimizer=self.g_updater.optimizer,
            d_optimizer=self.d_updater.optimizer,
            ada=self.ada,
            pl_mean=self.pl_mean,
            state=self.state,
            stats=self.stats,
            failures=self.failures,
            logit_means=self.gan.logit_means,
        )

    def _build_trackers(self) -> dict[str, Callable[[Tensor, Tensor], None]]:
        """Return the updates of the running state by the name of a batch mean (LossTerms.means), one per phase."""
        trackers: dict[str, Callable[[Tensor, Tensor], None]] = {
            "w_avg": self.w_avg.update,
            "pl_mean": self.pl_mean.update,
            "real_sign": self.ada.observe,
            "logits": self.gan.logit_means.update,
        }
        if hasattr(self.G.synthesis, "input_magnitudes"):
            magnitudes: Any = self.G.synthesis.input_magnitudes
            rate = 1 - 0.5 ** (self.batch_size / MAGNITUDE_HALF_LIFE)
            trackers["input_magnitudes"] = RunningMean(magnitudes, rate).update
        return trackers

    def _build_phases(self) -> None:
        config = self.config
        frozen_layers = self.D.layers_from_image()[: config.freeze_layers]
        frozen = {id(p) for layer in frozen_layers for p in layer.parameters()}
        d_parameters = [p for p in self.D.parameters() if id(p) not in frozen]
        self.g_updater = build_updater([*self.G.parameters()], config.g_optimizer, config.loss.pl_interval)
        self.d_updater = build_updater(d_parameters, config.d_optimizer, config.loss.r1_interval)
        self.gan = GAN(
            G=self.G,
            D=self.D,
            augment=self.augment,
            labels=self.dataset.labels.to(self.device),
            style_mixing=config.loss.style_mixing,
            pl_mean=self.pl_mean.value,
            num_rgb_heads=config.generator.num_rgb_heads,
            group_size=config.discriminator.group_size,
            paired_augment=config.augment.paired,
            pseudo_augment=config.augment.mode == "apa",
            logit_means=LogitMeans().to(self.device),
        )
        self.G.requires_grad_(False)
        self.D.requires_grad_(False)
        self.phases = build_phases(
            self.gan, config.loss, self.g_updater, self.d_updater, use_compiled=config.run.compile
        )

    @property
    def is_finished(self) -> bool:
        """Return whether training has seen the configured number of images."""
        return self.state.nimg >= self.total_nimg

    def train(self) -> None:
        """Train for the configured number of images, or until a hook stops training."""
        for hook in self.hooks:
            hook.on_start(self)
        data = self._batches()
        began = time.monotonic() - self.state.elapsed
        self._start_tick()
        if self.state.step == 0:
            self._call_hooks(Tick(0, 0, is_first=True, is_last=False, stats={}, values=self._progress()))
        while not (self.is_finished or self.is_stopped):
            with self.stopwatch.section("data"):
                reals = [next(data) for _ in range(self.batches_per_step)]
            for phase in self.phases:
                if phase.is_due(self.state.step):
                    with self.stopwatch.section(phase.name):
                        self.run_phase(phase, *reals[phase.batch])
            self.ema.update(self.state.nimg, self.batch_size)
            self.profiles.update(self.state.nimg, self.batch_size)
            self.state.nimg += self.batch_size
            self.state.step += 1
            self.state.elapsed = time.monotonic() - began
            self._add_step_time()
            self.follow_schedules()
            self.ada.update(self.state.step, self.batch_size)
            self._call_hooks(self._finish_tick())
        for hook in reversed(self.hooks):
            hook.on_end(self)

    def follow_schedules(self) -> None:
        """Set all values that have a schedule to their values at the current number of images."""
        nimg = self.state.nimg
        self.g_updater.follow_schedules(nimg)
        self.d_updater.follow_schedules(nimg)
        self.gan.follow_schedules(nimg)
        self.ada.follow_schedule(nimg)

    def run_phase(self, phase: Phase, img: Tensor, c: Tensor) -> None:
        """Take one optimizer step, accumulating gradients over micro-batches of `batch_gpu` images.

        `img` and `c` are this process's share of the batch. The result does not depend on the number of processes:
        each micro-batch seeds its random numbers from (seed, phase, position of its first image in the run), and
        running state is updated once, with the mean over all micro-batches of all processes. If the loss, a batch mean
        or the gradient is not finite, the optimizer step and all updates of running state and statistics are skipped.
        """
        updater, first = phase.updater, self.state.nimg + distributed.rank() * len(img)
        with updater.requiring_grad(), execution.using(self.execution):
            accumulate = self._accumulator(phase, img[: self.batch_gpu], c[: self.batch_gpu])
            updater.gradients.zero()
            phase.means.zero()
            found = Stats(self.device)
            for i, (x, y) in enumerate(zip(img.split(self.batch_gpu), c.split(self.batch_gpu), strict=True)):
                seed_step(self.config.seed, phase.name, first + i * self.batch_gpu)
                found.add_moments(*accumulate(x, y))

        norm, means = updater.gradients.reduce(), phase.means.reduce()
        found.add({f"Gradients/{phase.name}_norm": norm})
        is_bad = (norm + phase.means.vector.sum()) * 0 != 0  # not finite
        updater.clip(norm)
        updater.step(skip=is_bad)
        self.transforms.forget(updater.parameters)
        for name, mean in means.items():
            self.trackers[name](mean, is_bad)
        for names, rows in found.tables.items():
            self.stats.add_moments(names, rows.masked_fill(is_bad, 0))
        self.failures.note(phase.name, self.state.step, is_bad)

    def trial_step(self) -> None:
        """Run every phase twice in this process alone, to measure memory use; the weights do not change.

        Images are loaded and the optimizers allocate their moments, but optimizer steps are skipped. Running out of
        memory while capturing a CUDA graph raises an error.
        """
        if self.graphs:
            self.graphs.must_fit = True
        data = self._batches()
        img, c = next(data)
        x, y = img[: self.batch_gpu], c[: self.batch_gpu]
        for phase in self.phases * 2:
            with phase.updater.requiring_grad(), execution.using(self.execution):
                self._accumulator(phase, x, y)(x, y)
            phase.updater.step(skip=torch.ones([], dtype=torch.bool, device=self.device))

    def _accumulator(self, phase: Phase, img: Tensor, c: Tensor) -> Callable[[Tensor, Tensor], Moments]:
        """Return `_accumulate` for a phase; with run.graphs, as a CUDA graph for micro-batches of this shape."""
        accumulate = partial(self._accumulate, phase)
        return self.graphs.capture(phase.name, phase.name, accumulate, img, c) if self.graphs else accumulate

    def _accumulate(self, phase: Phase, img: Tensor, c: Tensor) -> Moments:
        """Accumulate the gradient and the batch means of a micro-batch; return the moments of its statistics."""
        share = self.batch_gpu * distributed.world_size() / self.batch_size
        with execution.using(weights=phase.weights), phase.weights.filled():
            terms = phase.loss(self.gan.repeat_for_rgb_heads(img), c)
            phase.updater.gradients.add(terms.loss * (phase.weight * share))
        phase.means.add(terms, share)
        return tuple(terms.stats), moments([*terms.stats.values()])

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's share of each batch: images in [-1, 1] and float labels, on the device."""
        run, on_gpu = self.config.run, self.device.type == "cuda"
        share: dict[str, Any] = {
            "seed": self.config.seed,
            "position": self.state.nimg * self.batches_per_step,
            "batch_size": self.batch_size,
            "rank": distributed.rank(),
            "world_size": distributed.world_size(),
            "device": self.device,
        }
        if fits_on_gpu(self.dataset, self.device) if run.data_on_gpu is None else run.data_on_gpu:
            stream = resident_batches(self.dataset, **share)
        else:
            workers = 2 * on_gpu if run.workers is None else run.workers
            stream = batches(self.dataset, workers=workers, pin_memory=on_gpu, **share)
        for images, labels in stream:
            img = images.float() / 127.5 - 1
            if self.config.channels_last:
                img = img.contiguous(memory_format=torch.channels_last)
            yield img, encode_labels(labels, self.dataset.c_dim)

    def _call_hooks(self, tick: Tick | None) -> None:
        """Call `on_step` of every hook, except before the first step, and `on_tick` if a tick has ended."""
        began = time.monotonic()
        for hook in self.hooks:
            if self.state.step > 0:
                hook.on_step(self)
            if tick:
                hook.on_tick(self, tick)
        if tick:
            self._start_tick(maintenance=time.monotonic() - began)

    def _start_tick(self, maintenance: float = 0.0) -> None:
        """Start the measurements of a tick; `maintenance` is the time spent in hooks at the end of the last tick."""
        self.tick_began, self.tick_nimg_began, self.maintenance = time.monotonic(), self.state.nimg, maintenance
        self.clocks = time.monotonic(), time.process_time()

    def _add_step_time(self) -> None:
        """Add the time since the last call or the start of the tick to the time of the steps."""
        wall, cpu = self.clocks
        self.clocks = time.monotonic(), time.process_time()
        self.state.step_seconds += self.clocks[0] - wall
        self.state.cpu_seconds += self.clocks[1] - cpu

    def current_tick(self) -> Tick | None:
        """Return the tick that ends at this step, without statistics, or None if no tick ends here."""
        number = self.state.nimg // self.tick_nimg
        previous = (self.state.nimg - self.batch_size) // self.tick_nimg
        if number == previous and not self.is_finished:
            return None
        return Tick(number, previous, is_first=False, is_last=self.is_finished, stats={}, values={})

    def _finish_tick(self) -> Tick | None:
        """Return the tick that ends at this step, with its statistics, or None if no tick ends here."""
        tick = self.current_tick()
        if tick is None:
            return None
        stats = self.stats.collect()
        return replace(tick, stats=stats, values=self._progress() | self._check_failures())

    def _check_failures(self) -> dict[str, float]:
        """Return the skipped updates of this tick by phase. Raises UserError if there are any, unless nan='skip'."""
        self.stop_if_failed()
        return {f"Skipped/{phase}": float(count) for phase, (count, _) in self.failures.collect().items()}

    def stop_if_failed(self) -> None:
        """Raise UserError if any value of this tick was not finite, unless nan='skip'. Synchronizes with the device."""
        failures = self.failures.peek()
        if failures and self.config.run.nan == "stop":
            phase, (_, step) = min(failures.items(), key=lambda item: item[1][1])
            distributed.from_main(lambda: self._raise_non_finite(phase, step))

    def _raise_non_finite(self, phase: str, step: int) -> None:
        known = f"Last good snapshot: {self.last_snapshot or 'none written yet'}"
        start = f"start from it with --resume={self.last_snapshot}" if self.last_snapshot else "start again"
        raise UserError(
            f"{phase} produced non-finite values at step {step} (kimg {step * self.batch_size / 1000:.1f}): "
            f"its update was skipped, and training stops. {known}; {start} with a higher --gamma (or "
            "loss.gp_weight), lower --glr and --dlr, or --precision=fp32. Or resume with --set "
            "run.nan=skip, which skips such updates"
        )

    def _progress(self) -> dict[str, float]:
        self._add_step_time()  # of the last step, for which `Stats.collect` has waited
        values = {
            "Progress/tick": float(self.state.nimg // self.tick_nimg),
            "Progress/kimg": self.state.nimg / 1000,
            "Progress/step": float(self.state.step),
            "Progress/augment": float(self.augment.p),
            "Timing/total_sec": self.state.elapsed,
            "Timing/steps_sec": self.state.step_seconds,
            "Timing/steps_cpu_sec": self.state.cpu_seconds,
            "Timing/maintenance_sec": self.maintenance,
        }
        peak = peak_memory()
        if peak:
            values["Resources/cpu_mem_gb"] = peak / 2**30
        if self.device.type == "cuda":
            values["Resources/peak_gpu_mem_gb"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        values |= {f"Schedule/{path}": value.at(self.state.nimg) for path, value in schedules(self.config).items()}
        done = self.state.nimg - self.tick_nimg_began
        if done:
            values["Timing/sec_per_tick"] = time.monotonic() - self.tick_began
            values["Timing/sec_per_kimg"] = values["Timing/sec_per_tick"] * 1000 / done
        return values | {f"Timing/{name}_ms": ms for name, ms in self.stopwatch.collect().items()}

    def synchronise(self) -> None:
        """Broadcast the weights of rank 0 to all processes."""
        for module in (self.G, self.D, self.ema.module):
            distributed.broadcast([*module.parameters(), *module.buffers()])
        distributed.broadcast(self.profiles.tensors())

    def check_replicas(self) -> None:
        """Raise UserError naming the state that differs between processes, if any. A collective call."""
        if distributed.world_size() == 1:
            return
        own = self.checkpoint.fingerprints()
        del own["state"], own["stats"]  # these differ: elapsed time, and statistics of each process's own images
        sums = [x % 2**62 for x in own.values()]
        highest = distributed.maximum([*sums, *(-x for x in sums)])
        lowest = [-x for x in highest[len(sums) :]]
        differing = [name for name, low, high in zip(own, lowest, highest, strict=False) if low != high]
        if differing:
            distributed.from_main(lambda: self._raise_diverged(differing))

    def _raise_diverged(self, differing: Sequence[str]) -> None:
        raise UserError(
            f"the processes differ in {', '.join(differing)} at kimg {self.state.nimg / 1000:g}, so nothing is saved: "
            "a GPU or its memory is faulty, or the machines have different library versions. --resume=latest resumes "
            "from the last training state"
        )

    def save(self, path: Path) -> None:
        """Write a training state that `resume` can load."""
        self.checkpoint.write(path, self.capture())

    def capture(self) -> dict[str, Any]:
        """Return a copy of the current training state, which can be written while training continues."""
        return self.checkpoint.capture(config=to_json(self.config), data_hash=self.dataset.content_hash)

    def resume(self, path: Path) -> bool:
        """Load a training state; return whether the dataset is unchanged. Raises UserError if the state does not fit.

        Hyperparameters in the state (learning rate, betas, eps, a fixed p) are replaced by the configuration's.
        """
        payload = self.checkpoint.load(path)
        self.follow_schedules()
        return bool(payload.get("data_hash") == self.dataset.content_hash)


def run_id(config: TrainConfig) -> str:
    """Return a hash of a new run's configuration and seed, which identifies the run in files of its averages."""
    settings = {name: value for name, value in to_json(config).items() if name != "run"}
    return digest(settings)


def _batch_sizes(config: TrainConfig) -> tuple[int, int]:
    if config.batch_size is None or not isinstance(config.run.batch_gpu, int) or config.precision is None:
        raise ConfigError("batch_size", config.batch_size, "not resolved")
    return config.batch_size, config.run.batch_gpu
