"""Background writing of snapshots and training states, and deletion of old training states."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dnnlib.config import UserError, WriteError
from dnnlib.util import describe_error, warn_on_write_error
from torch_utils import distributed
from torch_utils.background import BackgroundWriter
from torch_utils.checkpoint import Checkpoint
from training.run_folder import RunFolder, list_states
from training.snapshots import post_hoc
from training.snapshots.snapshot import capture_network, write_network
from training.training_loop import Trainer


class Saver:
    """Writer of snapshots and training states: copies both at a step and writes them in the background on rank 0.

    A write error is reported at the next tick; training continues, and earlier files stay intact.
    """

    def __init__(self, folder: RunFolder, last_snapshot: Path | None = None) -> None:
        self.folder, self.run_dir, self.run = folder, folder.path, folder.config.run
        self.writer = BackgroundWriter()
        self.saved_nimg = 0  # nimg of the newest training state
        self.last_snapshot = last_snapshot  # newest snapshot written

    def save(self, trainer: Trainer, *, snapshot: bool) -> None:
        """Write a training state, unless this step is 0 or its state is already saved, and optionally a snapshot.

        The power-function averages are written with the snapshot.
        A collective call. Raises UserError if the processes have diverged.
        """
        trainer.check_replicas()
        trainer.stats.gather()
        if not distributed.is_main():
            return
        nimg, jobs = trainer.state.nimg, []
        if snapshot or nimg != self.saved_nimg:
            self.writer.wait()  # before anything is copied, to save memory
        if snapshot:
            path = self.run_dir / f"network-snapshot-{nimg // 1000:06d}.pkl"
            jobs.append(partial(self._write_snapshot, path, capture_snapshot(trainer)))
            jobs += [partial(post_hoc.write, path, content) for path, content in self._averages(trainer)]
        if nimg != self.saved_nimg:
            path = self.run_dir / f"training-state-{nimg // 1000:06d}.pt"
            jobs.append(partial(self._write_state, path, trainer.capture()))
            self.saved_nimg = nimg
        if jobs:
            self.writer.submit(partial(_run_all, jobs))
        if nimg == 0:
            self._warn(self.writer.join())  # the data loader forks next, which is unsafe with a running thread

    def _averages(self, trainer: Trainer) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield the path and a copy of the content of each power-function average; at image 0 there are none."""
        nimg = trainer.state.nimg
        for sigma in trainer.profiles.averages if nimg else ():
            content = post_hoc.capture(trainer.profiles, sigma, nimg, trainer.batch_size)
            yield self.run_dir / post_hoc.file_name(sigma, nimg), content

    def check_folder(self, trainer: Trainer) -> None:
        """Restore the run's folder if it was removed, and write a training state into it. A collective call.

        If the folder cannot be created, writes the training state elsewhere and raises UserError naming that file.
        """
        if distributed.from_main(lambda: self._restore_folder(trainer)):
            self.save(trainer, snapshot=False)

    def _restore_folder(self, trainer: Trainer) -> bool:
        try:
            if not self.folder.restore():
                return False
        except (OSError, UserError) as error:
            raise UserError(self._rescue(trainer, describe_error(error))) from None
        print(
            f"Warning: {self.run_dir}: files were removed or moved during the run; options, log and a training "
            "state are written again",
            file=sys.stderr,
            flush=True,
        )
        self.saved_nimg = 0
        if not (self.last_snapshot and self.last_snapshot.exists()):
            self.last_snapshot = trainer.last_snapshot = None
        return True

    def _rescue(self, trainer: Trainer, reason: str) -> str:
        """Write a training state outside the run's folder; return the error message."""
        problem = f"{self.run_dir}: was removed during the run and cannot be created again ({reason})"
        failed = []
        for parent in (None, Path.cwd, Path.home):  # None: the system's folder for temporary files
            try:
                folder = tempfile.mkdtemp(prefix="styleformer-", dir=parent and parent())
                state = Path(folder) / f"training-state-{trainer.state.nimg // 1000:06d}.pt"
                trainer.save(state)
                return f"{problem}. The training state is in {state}: --resume={state} starts a new run from it"
            except (OSError, RuntimeError, WriteError) as error:
                failed.append(describe_error(error))
        return f"{problem}; the training state could not be saved elsewhere: {'; '.join(failed)}"

    def report(self, trainer: Trainer) -> None:
        """Print warnings about write errors and update `trainer.last_snapshot`."""
        self._warn(self.writer.collect())
        trainer.last_snapshot = self.last_snapshot or trainer.last_snapshot

    def keep_best(self, trainer: Trainer, metric: str) -> None:
        """Write the current networks as network-best-<metric>.pkl and, with run.keep_best, the training state.

        Called on rank 0; writes in the foreground. Raises WriteError.
        """
        write_network(self.run_dir / f"network-best-{metric}.pkl", capture_snapshot(trainer))
        if self.run.keep_best:
            self.writer.wait()  # to save memory
            trainer.save(self.run_dir / f"state-best-{metric}.pt")

    def wait_for(self, snapshot: Path | None) -> Path | None:
        """Wait until a snapshot is written; return its path, or None if it could not be written."""
        self.writer.wait()
        return snapshot if snapshot == self.last_snapshot else None

    def finish(self) -> None:
        """Wait for pending writes. Raises WriteError if a write failed."""
        failed = self.writer.join()
        self._warn(failed[:-1])
        if failed:
            raise failed[-1]

    def _write_snapshot(self, path: Path, payload: dict[str, object]) -> None:
        write_network(path, payload)
        self.last_snapshot = path

    def _write_state(self, path: Path, payload: dict[str, object]) -> None:
        Checkpoint.write(path, payload)
        # Later states are corrupt: the run skipped them when it was resumed from an earlier state.
        states = [state for state in list_states(self.run_dir) if state <= path]
        for old in obsolete(states, self.run.keep_last, self.run.keep_every):
            with warn_on_write_error():
                old.unlink(missing_ok=True)

    @staticmethod
    def _warn(failed: Sequence[WriteError]) -> None:
        for error in failed:
            print(f"Warning: {error}; training continues", file=sys.stderr, flush=True)


def obsolete(states: Sequence[Path], keep_last: int, keep_every: float | None) -> list[Path]:
    """Return the training states to delete; `states` are all states of a run, oldest first.

    The last `keep_last` states and the first state at or after each multiple of `keep_every` thousand images are kept.
    """
    kept = set(states[-keep_last:])
    if keep_every is not None:
        period = 0
        for path in states:
            now = int(int(path.stem.rpartition("-")[2]) // keep_every)
            if now > period:
                kept.add(path)
            period = now
    return [path for path in states if path not in kept]


def capture_snapshot(trainer: Trainer) -> dict[str, object]:
    """Return a copy of the current networks as the content of a snapshot."""
    return capture_network(
        config=trainer.config,
        G=trainer.G,
        D=trainer.D,
        G_ema=trainer.ema.module,
        nimg=trainer.state.nimg,
        ada_p=float(trainer.augment.p),
        labels=trainer.dataset.label_kind,
    )


def _run_all(jobs: Sequence[Callable[[], None]]) -> None:
    """Run every job, even after a failure. Raises WriteError with all errors."""
    errors = []
    for job in jobs:
        try:
            job()
        except WriteError as error:
            errors.append(error)
    if errors:
        raise WriteError("; ".join(map(str, errors)))
