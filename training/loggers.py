"""Loggers of values and images: TensorBoard, Weights & Biases.

A logger has `add(values, nimg)`, `add_image(name, image, nimg)` and `close(succeeded)`; LOGGERS lists the names of all
loggers. `Loggers` passes values to all loggers of a run; an error in a logger never stops training.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor

from dnnlib.config import UserError, to_json
from dnnlib.screen import without_secrets
from dnnlib.util import read_regular, write_atomically
from training.config import LOGGERS, TrainConfig


class Logger(Protocol):
    """Interface of loggers."""

    def add(self, values: Mapping[str, float], nimg: int) -> None:
        """Log values by name."""

    def add_image(self, name: str, image: Tensor, nimg: int) -> None:
        """Log an image, uint8 (C, H, W)."""

    def close(self, succeeded: bool) -> None:
        """Write pending data; `succeeded` is false if the run ended with an error."""


class TensorBoard:
    """Events in the run's folder, for `tensorboard --logdir`. Needs the package tensorboard."""

    def __init__(self, run_dir: Path, config: TrainConfig, nimg: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Hides events beyond the training state from which a killed run is resumed.
        self.writer = SummaryWriter(str(run_dir), purge_step=nimg + 1 if nimg else None)
        self.has_failed = False

    def add(self, values: Mapping[str, float], nimg: int) -> None:
        with self._writing() as writer:
            for name, value in values.items():
                writer.add_scalar(name, value, nimg)

    def add_image(self, name: str, image: Tensor, nimg: int) -> None:
        with self._writing() as writer:
            writer.add_image(name, image, nimg)

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        """Yield the writer and flush it; create a new writer after an error, because the error ended its thread."""
        if self.has_failed:
            for path in Path(self.writer.log_dir).glob(f"events.out.tfevents.*.{os.getpid()}.*"):
                if not path.stat().st_size:  # left by a writer when the disk was full
                    path.unlink()
            self.writer, self.has_failed = type(self.writer)(self.writer.log_dir), False
        try:
            yield self.writer
            self.writer.flush()
        except Exception:
            self.has_failed = True
            raise

    def close(self, succeeded: bool) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, named after the folder. Needs the package wandb; WANDB_* variables apply.

    The W&B run id is stored in the folder, so that a resumed run continues the same W&B run. The x axis is
    Progress/kimg because W&B's own step cannot go back to the training state from which a killed run is resumed.
    """

    ID_FILE = "wandb-id.txt"
    PROJECT = "styleformer"  # default of WANDB_PROJECT

    def __init__(self, run_dir: Path, config: TrainConfig, nimg: int) -> None:
        import wandb

        self.wandb = wandb
        with _arguments_without_secrets():  # wandb records the command line
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", self.PROJECT),
                name=run_dir.name,
                id=self._run_id(run_dir),
                resume="allow",
                dir=run_dir,
                config=to_json(config),
                allow_val_change=True,  # a run may be resumed with different options
                settings=wandb.Settings(console="off"),  # log.txt contains the output
            )
        self.run.define_metric("*", step_metric="Progress/kimg")

    def _run_id(self, run_dir: Path) -> str:
        path = run_dir / self.ID_FILE
        if not path.exists():
            write_atomically(path, secrets.token_hex(4) + "\n")
        return read_regular(path, 100).decode(errors="replace").strip()

    def add(self, values: Mapping[str, float], nimg: int) -> None:
        self.run.log({**values, "Progress/kimg": nimg / 1000})

    def add_image(self, name: str, image: Tensor, nimg: int) -> None:
        pixels = image.permute(1, 2, 0).numpy()  # (H, W, C)
        self.run.log({name: self.wandb.Image(pixels), "Progress/kimg": nimg / 1000})

    def close(self, succeeded: bool) -> None:
        self.run.finish(exit_code=0 if succeeded else 1)


@contextmanager
def _arguments_without_secrets() -> Iterator[None]:
    """Remove secrets in URLs from sys.argv inside the block."""
    given = sys.argv
    sys.argv = [*map(without_secrets, given)]
    try:
        yield
    finally:
        sys.argv = given


_CLASSES: Mapping[str, Callable[[Path, TrainConfig, int], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
assert tuple(_CLASSES) == LOGGERS


def choose_loggers(names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the loggers to use; without `names`, TensorBoard if its package is installed.

    Raises UserError if the package of a given logger is missing; a logger has the name of its package.
    """
    if names is None:
        return tuple(filter(_is_installed, LOGGERS[:1]))
    for name in names:
        if not _is_installed(name):
            raise UserError(f"--log={name}: the package {name} is not installed: pip install '.[{name}]'")
    return tuple(names)


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # None for a plain folder of that name, e.g. W&B's output


class Loggers:
    """All loggers of a run, closed at the end of the block. Only rank 0 has loggers; `names` is empty on other ranks.

    `nimg` is the image count at which the run starts or resumes. Each distinct error of a logger is reported once.
    """

    def __init__(self, names: Sequence[str], run_dir: Path, config: TrainConfig, nimg: int = 0) -> None:
        self.loggers: dict[str, Logger] = {}
        self.problems: set[str] = set()  # already reported
        for name in names:
            with self._warn_on_error(name):
                self.loggers[name] = _CLASSES[name](run_dir, config, nimg)

    def add(self, values: Mapping[str, float], nimg: int) -> None:
        """Log values by name."""
        for name, logger in self.loggers.items():
            with self._warn_on_error(name):
                logger.add(values, nimg)

    def add_image(self, name: str, image: Tensor, nimg: int) -> None:
        """Log an image, uint8 (C, H, W)."""
        for logger_name, logger in self.loggers.items():
            with self._warn_on_error(logger_name):
                logger.add_image(name, image.cpu(), nimg)

    def __enter__(self) -> Loggers:
        self.excepthook, threading.excepthook = threading.excepthook, self._silence_writer_thread
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, logger in self.loggers.items():
            with self._warn_on_error(name):
                logger.close(error is None)
        threading.excepthook = self.excepthook

    def _silence_writer_thread(self, error: threading.ExceptHookArgs) -> None:
        """Suppress the traceback of TensorBoard's writer thread; the next call raises the same error."""
        if not type(error.thread).__module__.startswith("tensorboard."):
            self.excepthook(error)

    @contextmanager
    def _warn_on_error(self, name: str) -> Iterator[None]:
        """Convert any exception in a logger to a warning, because loggers depend on external code and services."""
        try:
            yield
        except Exception as error:
            problem = " ".join(f"--log={name}: {type(error).__name__}: {error}".split())
            if problem not in self.problems:
                self.problems.add(problem)
                print(f"Warning: {problem}; training continues", file=sys.stderr, flush=True)
