"""Shared fixtures: a small dataset of scenes, and a tiny configuration that trains on it in seconds."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock
from together import MODULES, work

import dataset_tool
from dnnlib.config import OPTIONS_FILE, UserError, override
from dnnlib.util import FolderLock
from torch_utils import distributed
from training.config import PRESETS, Environment, TrainConfig, resolve
from training.dataset import ImageDataset
from training.hooks import Hook
from training.run_folder import RunFolder
from training.saving import Saver
from training.training_loop import Tick, Trainer

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

PATIENCE = 600  # timeout in seconds for programs started by a test, even on a busy machine


_LOCKS = ExitStack()


@pytest.fixture(autouse=True, scope="session")
def _release_locks() -> Iterator[None]:
    """Release the folder locks of `new_saver` at the end of the session."""
    with _LOCKS:
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Use one thread per test process, since several processes share the cores of a machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _float32_on_gpus() -> Iterator[None]:
    """Disable TF32, the default of convolutions on a GPU, and restore the settings after each test."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def chromium() -> str:
    """Return the path of Chromium; tests are skipped without it."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("requires Chromium")
    return path


@pytest.fixture(scope="module")
def stub_gpu() -> Iterator[Executor]:
    """Single-process pool in which PyTorch sees a simulated 80 GiB GPU that computes nothing."""
    import launches

    try:
        with launches.processes() as pool:
            yield pool
    except UserError as error:
        pytest.skip(str(error))


class OnStep(Hook):
    """Hook that calls a function after every step."""

    def __init__(self, function: Callable[[Trainer], object]) -> None:
        self.function = function

    def on_step(self, trainer: Trainer) -> None:
        self.function(trainer)


class OnTick(Hook):
    """Hook that calls a function at every tick."""

    def __init__(self, function: Callable[[Trainer, Tick], object]) -> None:
        self.function = function

    def on_tick(self, trainer: Trainer, tick: Tick) -> None:
        self.function(trainer, tick)


def all_captured(trainer: Trainer) -> bool:
    """Return whether every phase was captured as a CUDA graph; an uncaptured phase trains without an error."""
    return trainer.graphs is not None and trainer.graphs.captured.keys() == {phase.name for phase in trainer.phases}


def launch_as(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    """Set the environment variables of torchrun, by default for rank 0 of two processes on one machine."""
    values = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    values |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"} | changes
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def make_shapes(path: Path, side: int, count: int, seed: int = 0) -> Path:
    """Build a dataset of labelled scenes of side x side pixels; scene i depends on (seed, i)."""
    options = [f"--max-images={count}", f"--width={side}", f"--height={side}", "--workers=1", f"--seed={seed}"]
    result = CliRunner().invoke(dataset_tool.main, ["--source=shapes", f"--dest={path}", *options])
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture(scope="session")
def shapes_zip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset of 256 scenes of 16x16 pixels, the resolution of SMALL."""
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes.zip", 16, 256)


@pytest.fixture(scope="session")
def shapes32_zip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset of 256 scenes of 32x32 pixels, the resolution of several presets."""
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes.zip", 32, 256)


@pytest.fixture(scope="session")
def together(shapes_zip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the output of each module's `in_two_processes`, shared by all test processes."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    done = base / "together"
    with FileLock(base / "together.lock"):
        if not done.exists():
            folder = base / "together-begun"
            for name in MODULES:
                (folder / name).mkdir(parents=True, exist_ok=True)
            distributed.launch(work, 2, folder, shapes_zip)
            folder.rename(done)
    return done


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest files first, and skip tests marked `gpu` with a reason if there is no GPU."""
    items.sort(key=lambda item: item.path.stem not in LONG)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none here"))


# Files that start programs or compile. At the end of a run, they would leave the other test processes idle.
LONG = (
    "test_torture",
    "test_launches",
    "test_graphs",
    "test_portability",
    "test_onnx",
    "test_failures",
    "test_auto_batch",
    "test_training",
)

# Options of train.py that make the preset `tiny` even smaller.
SMALL = [
    "--cfg=tiny",
    "--g_dict=32,16",
    "--num_layers=1,1",
    "--cbase=256",
    "--set=discriminator.channel_max=16",
    "--workers=0",
]
SMALL += ["--batch=16", "--linformer=0", "--gamma=0.5"]


def small_config(data: Path, **changes: object) -> TrainConfig:
    """Resolve the configuration of SMALL for a dataset; `changes` are config paths with __ instead of dots."""
    values = {
        "generator.widths": (32, 16),
        "generator.layers": (1, 1),
        "discriminator.channel_base": 256,
        "discriminator.channel_max": 16,
        "data.path": str(data),
        "run.workers": 0,
        "run.graphs": False,
        "batch_size": 16,
        "generator.linformer": False,
        "loss.r1_gamma": 0.5,
    }
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    config = override(PRESETS["tiny"], values)
    dataset = ImageDataset(config.data)
    on_gpu = torch.cuda.is_available()
    return resolve(config, Environment(img_shape=dataset.img_shape, c_dim=dataset.c_dim, on_gpu=on_gpu))


def new_saver(folder: Path, config: TrainConfig) -> Saver:
    """Create the saver of a run in this folder."""
    lock = _LOCKS.enter_context(FolderLock())
    lock.acquire(folder)
    (folder / OPTIONS_FILE).touch()
    return Saver(RunFolder(folder, config, lock))
