"""Where the values and pictures of a run go beside its folder: TensorBoard, Weights & Biases.

A logger has `add(values, nimg)`, `add_image(name, picture, nimg)` and `close(succeeded)`; LOGGERS names all there
are. `Loggers` gives all of a run the same, and one that fails never stops training.
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
    """What shows the values of a run."""

    def add(self, values: Mapping[str, float], nimg: int) -> None:
        """Show values by name."""

    def add_image(self, name: str, picture: Tensor, nimg: int) -> None:
        """Show a picture, uint8 (C, H, W)."""

    def close(self, succeeded: bool) -> None:
        """Write what is left; `succeeded` says whether the run ended without an error."""


class TensorBoard:
    """Events in the run's folder, for `tensorboard --logdir`. Needs the package tensorboard."""

    def __init__(self, run_dir: Path, config: TrainConfig, nimg: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What lies beyond the training state that a killed run goes on from is not shown.
        self.writer = SummaryWriter(str(run_dir), purge_step=nimg + 1 if nimg else None)
        self.has_failed = False

    def add(self, values: Mapping[str, float], nimg: int) -> None:
        with self._writing() as writer:
            for name, value in values.items():
                writer.add_scalar(name, value, nimg)

    def add_image(self, name: str, picture: Tensor, nimg: int) -> None:
        with self._writing() as writer:
            writer.add_image(name, picture, nimg)

    @contextmanager
    def _writing(self) -> Iterator[Any]:
        """Yield the writer and flush it; a new one after a failure, of which the thread that writes has ended."""
        if self.has_failed:
            for path in Path(self.writer.log_dir).glob(f"events.out.tfevents.*.{os.getpid()}.*"):
                if not path.stat().st_size:  # of a writer for which there was no room
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

    Its id is kept in the folder, so that a run that goes on does so there too. The axis is Progress/kimg and not W&B's
    own step, which cannot go back to the training state that a killed run goes on from.
    """

    ID_FILE = "wandb-id.txt"
    PROJECT = "styleformer"  # unless WANDB_PROJECT says otherwise

    def __init__(self, run_dir: Path, config: TrainConfig, nimg: int) -> None:
        import wandb

        self.wandb = wandb
        with _arguments_without_secrets():  # it records them
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", self.PROJECT),
                name=run_dir.name,
                id=self._run_id(run_dir),
                resume="allow",
                dir=run_dir,
                config=to_json(config),
                allow_val_change=True,  # a run may go on under other options
                settings=wandb.Settings(console="off"),  # log.txt has it
            )
        self.run.define_metric("*", step_metric="Progress/kimg")

    def _run_id(self, run_dir: Path) -> str:
        path = run_dir / self.ID_FILE
        if not path.exists():
            write_atomically(path, secrets.token_hex(4) + "\n")
        return read_regular(path, 100).decode(errors="replace").strip()

    def add(self, values: Mapping[str, float], nimg: int) -> None:
        self.run.log({**values, "Progress/kimg": nimg / 1000})

    def add_image(self, name: str, picture: Tensor, nimg: int) -> None:
        pixels = picture.permute(1, 2, 0).numpy()  # (H, W, C)
        self.run.log({name: self.wandb.Image(pixels), "Progress/kimg": nimg / 1000})

    def close(self, succeeded: bool) -> None:
        self.run.finish(exit_code=0 if succeeded else 1)


@contextmanager
def _arguments_without_secrets() -> Iterator[None]:
    """Show the command line without the secrets of its addresses while active."""
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
    """Return the names of the loggers to use: without `names` TensorBoard, where its package is installed.

    Raises UserError for one that was named and whose package is missing; each is named after its package.
    """
    if names is None:
        return tuple(filter(_is_installed, LOGGERS[:1]))
    for name in names:
        if not _is_installed(name):
            raise UserError(f"--log={name}: the package {name} is not installed: pip install '.[{name}]'")
    return tuple(names)


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of that name, as W&B leaves behind, has none


class Loggers:
    """All loggers of a run, on its first process; elsewhere `names` is empty. Closes them at the end of a block.

    `nimg` is where the run goes on. Whatever goes wrong in a logger is told once.
    """

    def __init__(self, names: Sequence[str], run_dir: Path, config: TrainConfig, nimg: int = 0) -> None:
        self.loggers: dict[str, Logger] = {}
        self.problems: set[str] = set()  # that were told
        for name in names:
            with self._warn_on_write_error(name):
                self.loggers[name] = _CLASSES[name](run_dir, config, nimg)

    def add(self, values: Mapping[str, float], nimg: int) -> None:
        """Show values by name."""
        for name, logger in self.loggers.items():
            with self._warn_on_write_error(name):
                logger.add(values, nimg)

    def add_image(self, name: str, picture: Tensor, nimg: int) -> None:
        """Show a picture, uint8 (C, H, W)."""
        for logger_name, logger in self.loggers.items():
            with self._warn_on_write_error(logger_name):
                logger.add_image(name, picture.cpu(), nimg)

    def __enter__(self) -> Loggers:
        self.excepthook, threading.excepthook = threading.excepthook, self._silence_writer_thread
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, logger in self.loggers.items():
            with self._warn_on_write_error(name):
                logger.close(error is None)
        threading.excepthook = self.excepthook

    def _silence_writer_thread(self, error: threading.ExceptHookArgs) -> None:
        """Leave out the traceback of TensorBoard's writer thread: its error is raised by the next call, too."""
        if not type(error.thread).__module__.startswith("tensorboard."):
            self.excepthook(error)

    @contextmanager
    def _warn_on_write_error(self, name: str) -> Iterator[None]:
        """Warn of whatever goes wrong inside, in code and services that are not ours, and go on."""
        try:
            yield
        except Exception as error:
            problem = " ".join(f"--log={name}: {type(error).__name__}: {error}".split())
            if problem not in self.problems:
                self.problems.add(problem)
                print(f"Warning: {problem}; training goes on", file=sys.stderr, flush=True)
