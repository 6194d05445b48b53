"""Files passed to the wrong option: the message identifies the file and names the correct option."""

from __future__ import annotations

import gzip
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SMALL, small_config
from PIL import Image

import generate
import legacy
import train
from dnnlib.config import OPTIONS_FILE, UserError
from torch_utils.checkpoint import Checkpoint, write_file
from training.snapshots.snapshot import FORMAT, VERSION, capture_network

SHAPES = Path(__file__).parent.parent / "docs" / "shapes.pkl"


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return file.getvalue()


def _npz(array: bool) -> bytes:
    file = io.BytesIO()
    if array:
        np.save(file, np.zeros(3))
    else:
        np.savez(file, w=np.zeros([1, 2, 3]))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lambda: gzip.compress(SHAPES.read_bytes()[:1000]), "compressed with gzip; decompress it with gunzip"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "`git lfs pull`"),
        (_png, "an image"),
        (lambda: _npz(array=True), "a NumPy array"),
        (lambda: _npz(array=False), "NumPy arrays, as accepted by --projected-w and --direction"),
        (lambda: b"<html>not found</html>", "an HTML page, not a snapshot"),
        (lambda: b"", "empty"),
        (lambda: b"hello", "unknown format"),
    ],
)
def test_files_that_are_not_snapshots_are_identified(
    tmp_path: Path, content: Callable[[], bytes], expected: str
) -> None:
    path = tmp_path / "network.pkl"
    path.write_bytes(content())
    with pytest.raises(UserError, match="^" + str(path)) as error:
        legacy.load_network(path)
    assert expected in str(error.value)


def test_datasets_and_snapshots_are_not_confused(shapes_zip: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a dataset, as accepted by --data"):
        legacy.load_network(shapes_zip)
    result = CliRunner().invoke(train.main, [*SMALL, f"--data={SHAPES}", f"--outdir={tmp_path}", "-n"])
    assert result.exit_code == 2
    assert str(SHAPES) in result.output


def test_states_and_snapshots_are_not_confused(tmp_path: Path) -> None:
    state = tmp_path / "training-state-000001.pt"
    write_file(state, Checkpoint.FORMAT, Checkpoint.VERSION, {"parts": {}})
    with pytest.raises(
        UserError, match=r"a training-state file.*pass it to --resume; the snapshots .* network-snapshot-"
    ):
        legacy.load_network(state)
    with pytest.raises(UserError, match=r"a network-snapshot file.*pass it to --network, or to --resume for transfer"):
        Checkpoint.read(SHAPES)


def test_a_bare_array_is_refused_as_styles(tmp_path: Path) -> None:
    path = tmp_path / "w.npy"
    path.write_bytes(_npz(array=True))
    result = CliRunner().invoke(
        generate.main, [f"--network={SHAPES}", f"--projected-w={path}", f"--outdir={tmp_path / 'out'}"]
    )
    assert result.exit_code == 2
    assert f"--projected-w={path}: not an .npz file" in result.output
    assert "numpy.savez('styles.npz', w=numpy.load(FILE))" in result.output


def test_a_run_folder_selects_its_newest_snapshot(tmp_path: Path) -> None:
    (tmp_path / OPTIONS_FILE).write_text("{}")
    arguments = [f"--network={tmp_path}", "--seeds=0", f"--outdir={tmp_path / 'out'}"]
    no_snapshot = CliRunner().invoke(generate.main, arguments)
    assert (no_snapshot.exit_code, no_snapshot.output) == (
        2,
        f"Error: {tmp_path}: this run has written no snapshot yet\n",
    )
    (tmp_path / "network-snapshot-000010.pkl").write_bytes(b"not this one")
    shutil.copy(SHAPES, tmp_path / "network-snapshot-000200.pkl")
    written = CliRunner().invoke(generate.main, arguments)
    assert written.exit_code == 0, written.output
    assert (tmp_path / "out" / "seed0000.png").exists()
    info = CliRunner().invoke(legacy.main, ["info", str(tmp_path)])
    assert info.exit_code == 0
    assert "network-snapshot-000200.pkl" in info.output
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither a run .* nor a folder of safetensors"):
        legacy.load_network(tmp_path / "empty")


def test_conversion_works_without_a_subcommand(tmp_path: Path) -> None:
    dest = tmp_path / "shapes"
    result = CliRunner().invoke(legacy.main, [f"--source={SHAPES}", f"--dest={dest}"])
    assert (result.exit_code, result.output) == (0, f"Written: {dest}\n")
    assert (dest / "config.json").exists()


def test_transfer_learning_mentions_a_resumable_state(shapes_zip: Path, tmp_path: Path) -> None:
    config = small_config(shapes_zip)
    networks: dict[str, Any] = {"G": config.generator.build(), "D": config.discriminator.build()}
    snapshot = tmp_path / "network-snapshot-000001.pkl"
    write_file(snapshot, FORMAT, VERSION, capture_network(config=config, G_ema=networks["G"], **networks))
    arguments = [*SMALL, f"--data={shapes_zip}", f"--outdir={tmp_path / 'runs'}", f"--resume={snapshot}", "-n"]
    without_state = CliRunner().invoke(train.main, arguments)
    assert without_state.exit_code == 0, without_state.output
    assert "is next to the snapshot" not in without_state.output
    (tmp_path / "training-state-000001.pt").touch()
    with_state = CliRunner().invoke(train.main, arguments)
    assert with_state.exit_code == 0
    note = f"training-state-000001.pt is next to the snapshot: to resume that run, give --resume={tmp_path}\n"
    assert note in with_state.stderr
