"""Files that claim more than they hold: the cost of reading a file stays in proportion to its size.

Shared containers, overlapping strides, compressed members, widths without tensors, numbers beyond float64, pipes.
Each file is refused with one message that names it. `make test` draws 280 examples, `make test-slow` 13,000.
"""

from __future__ import annotations

import ctypes
import gzip
import hashlib
import importlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="hypothesis is an optional package")
import torch
from conftest import PATIENCE
from foreign_files import easy_dict, module, styleformer, write
from fuzzing import CORRUPTION, DATA, SNAPSHOT, STATE, corrupted, draws, error_message, for_all, run
from hypothesis import strategies as st

import calc_metrics
import generate
import legacy
import train
from dnnlib.allocator import tune_allocator
from dnnlib.config import OPTIONS_FILE, override, to_json
from exploration.directions import read_direction
from exploration.model import read_styles, save_styles
from metrics.detectors import read_detectors
from torch_utils.checkpoint import Checkpoint, digest, read_file, write_file
from torch_utils.pickles import read_torch_file
from training import resume
from training.config import PRESETS, Environment, read_config, resolve
from training.data_sources.sources import Drawing, open_source
from training.networks import DISCRIMINATORS, GENERATORS
from training.networks.transgan import TransGANConfig
from training.snapshots import snapshot
from training.snapshots.exchange import load_folder, save_folder

MAX_GROWTH = 400  # MiB; without limits, most of these files take gigabytes or never finish
HUGE = 10**400  # exceeds the range of a float


def reset_peak_memory() -> int | None:
    """Reset the peak memory of the process to the current usage and return it in MiB, or None if not permitted."""
    return_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("/proc/self/clear_refs cannot be written: memory is not measured")
        return None
    return peak_memory()


def return_free_memory() -> None:
    """Release free memory that a tuned glibc retains, because reusing this memory would not raise the peak."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def peak_memory() -> int:
    """Return the peak memory of the process in MiB since the last reset."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) // 1024


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Fail if the body of the `with` statement allocates hundreds of megabytes, even after a higher earlier peak."""
    before = reset_peak_memory()
    yield
    assert before is None or peak_memory() - before < MAX_GROWTH


def test_peak_memory_is_measured_after_an_earlier_peak() -> None:
    if reset_peak_memory() is None:
        pytest.skip("/proc/self/clear_refs cannot be written")
    tune_allocator()
    for _ in range(2):
        with pytest.raises(AssertionError), bounded_memory():
            bytearray(b"x") * ((MAX_GROWTH + 100) << 20)


def assert_refused(function: Callable[[], Any], text: str = "") -> str:
    """Assert that a function raises a UserError of one line with this text at little cost; return the message."""
    with bounded_memory():
        message = error_message(function)
    assert message is not None
    assert text in message
    assert "\n" not in message
    assert len(message) < 600
    return message


# --- files of torch.save


def payload() -> dict[str, Any]:
    """Return the content of a snapshot with all fields of the current configuration."""
    content = torch.load(SNAPSHOT, weights_only=True)["payload"]
    return {**content, "config": to_json(read_config(content["config"]))}


def save(path: Path, content: dict[str, Any], **head: Any) -> None:
    """Write a snapshot by torch.save with the checksum of SNAPSHOT, because some contents take forever to hash."""
    document = torch.load(SNAPSHOT, weights_only=True)
    torch.save({**document, "payload": content, **head}, path)


def nested(kind: type, levels: int = 40) -> Any:
    """Nest containers that hold the same container twice: 2^levels leaves in a few hundred bytes."""
    value: Any = {"a": 0} if kind is dict else kind([0])
    for _ in range(levels):
        value = {"a": value, "b": value} if kind is dict else kind([value, value])
    return value


def rewrite(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Apply a function to the members of a zip file."""
    with zipfile.ZipFile(path) as archive:
        members = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def write_tuple_key(path: Path) -> None:
    """Write a dictionary with a key whose hash takes 2^60 steps."""
    program = b"\x80\x02})" + b"q\x09h\x09\x86" * 60 + b"K\x01s."
    rewrite(path, lambda name, data: program if name.endswith("data.pkl") else data)


def write_false_storage_size(path: Path) -> None:
    """Write tensors that claim a storage of 2^28 numbers."""
    save(path, {"x": torch.zeros(512)})
    claim = b"J\x00\x00\x00\x10tq"
    rewrite(path, lambda name, data: data.replace(b"M\x00\x02tq", claim) if name.endswith("data.pkl") else data)


def write_overlapping_members(path: Path) -> None:
    """Write a zip directory in which 1000 names refer to one member."""
    save(path, {"x": torch.zeros(2**16)})
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    whole = next(info for info in infos if info.file_size >= 2**18)
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(1000):
            copy = zipfile.ZipInfo(whole.filename.replace("data/0", f"data/{number + 9}"))
            copy.file_size = copy.compress_size = whole.file_size
            copy.CRC, copy.header_offset = whole.CRC, whole.header_offset
            archive.filelist.append(copy)
        archive._didModify = True  # type: ignore[attr-defined]


def write_compressed(path: Path) -> None:
    save(path, {"x": torch.zeros(2**20)})
    rewrite(path, lambda _, data: data, zipfile.ZIP_DEFLATED)


def write_compressed_index(path: Path) -> None:
    program = b"\x80\x02" + b"N0" * 1_000_000 + b"N."
    rewrite(path, lambda name, data: program if name.endswith("data.pkl") else data, zipfile.ZIP_DEFLATED)


def write_many_views(path: Path) -> None:
    x = torch.zeros(2**18)
    save(path, {"x": [x.view(-1) for _ in range(500)]})


def nested_lists(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


one = torch.zeros(1)
TORCH_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shared lists": (lambda path: save(path, {"x": nested(list)}), "more than once"),
    "shared tuples": (lambda path: save(path, {"x": nested(tuple)}), "more than once"),
    "shared dicts": (lambda path: save(path, {"x": nested(dict)}), "more than once"),
    "shared lists in the configuration": (
        lambda path: save(path, {**payload(), "config": nested(list)}),
        "more than once",
    ),
    "shared lists as the checksum": (lambda path: save(path, {}, sha256=nested(list)), "more than once"),
    "shared tensor": (lambda path: save(path, {"x": [one] * 9}), "more than once"),
    "a key of tuples": (write_tuple_key, "a non-text key"),
    "stride 0": (lambda path: save(path, {"x": torch.zeros(1).expand(2**30)}), "whose elements overlap"),
    "overlapping strides": (
        lambda path: save(path, {"x": torch.zeros(2**15).as_strided((2**14, 2**14), (1, 1))}),
        "whose elements overlap",
    ),
    "false storage size": (write_false_storage_size, "in 2048 bytes"),
    "many views": (write_many_views, "than the file can hold"),
    "overlapping members": (write_overlapping_members, "members overlap"),
    "compressed tensors": (write_compressed, "members are compressed"),
    "compressed index": (write_compressed_index, "members are compressed"),
    "nested lists": (lambda path: save(path, {"x": nested_lists(80)}), "nested too deeply"),
    "400 digits": (lambda path: save(path, {"nimg": HUGE}), "more than 64 bits"),
    "5000 digits": (lambda path: save(path, {"nimg": 10**5000}), "more than 64 bits"),
    "bytes": (lambda path: save(path, {"x": b"text"}), "more than tensors and plain values"),
    "a set": (lambda path: save(path, {"x": {1}}), "more than tensors and plain values"),
    "a key that is a float": (lambda path: save(path, {"x": {0.5: 1}}), "more than tensors and plain values"),
    "complex numbers": (
        lambda path: save(path, {"x": torch.zeros(1, dtype=torch.complex64)}),
        "a malformed persistent id",
    ),
    "version 0": (lambda path: save(path, payload(), version=0), "format version 0, but the first is 1"),
    "version -1": (lambda path: save(path, payload(), version=-1), "format version -1, but the first is 1"),
    "version true": (lambda path: save(path, payload(), version=True), "not a file of this project"),
}


@pytest.mark.parametrize("name", TORCH_FILES)
def test_torch_files_claiming_more_than_they_hold_are_refused(name: str, tmp_path: Path) -> None:
    make, text = TORCH_FILES[name]
    path = tmp_path / "file.pkl"
    shutil.copy(SNAPSHOT, path)
    make(path)
    assert str(path) in assert_refused(lambda: snapshot.load_network(path), text)


@pytest.mark.parametrize("read", [legacy.describe, legacy.transfer_options, Checkpoint.read])
def test_every_reader_refuses_files_claiming_more_than_they_hold(read: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "file.pkl"
    shutil.copy(SNAPSHOT, path)
    for name in ("shared lists", "overlapping members"):
        make, text = TORCH_FILES[name]
        make(path)
        assert str(path) in assert_refused(partial(read, path), text)


def test_written_tensors_are_read_bit_for_bit(tmp_path: Path) -> None:
    """All types, empty tensors, memory layouts and views of larger tensors equal the result of torch.load."""
    x = torch.randn(6, 4, 3, 2)
    types = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]
    content = {
        "types": [x.to(dtype) for dtype in [*types, torch.uint8, torch.bool]],
        "layouts": (
            x.to(memory_format=torch.channels_last),
            x.permute(3, 1, 0, 2),
            x[::2, 1:],
            x[0],
        ),
        "small": {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "none": None, 7: (), "list": [], "dict": {}},
        "plain": [True, -(2**63), 2**64 - 1, 1e308, "é\n", float("inf")],
    }
    torch.save(content, tmp_path / "a.pt")
    write_file(tmp_path / "b.pt", "thing", 1, content)
    again, expected = read_torch_file(tmp_path / "a.pt"), torch.load(tmp_path / "a.pt", weights_only=True)
    assert digest(again) == digest(expected) == digest(read_file(tmp_path / "b.pt", "thing", 1, {}))
    assert [x.stride() for x in again["layouts"]] == [x.stride() for x in expected["layouts"]]
    for path, read in ((SNAPSHOT, read_torch_file), (STATE, read_torch_file)):
        assert digest(read(path)) == digest(torch.load(path, weights_only=True))


@draws(100, 4000)
def test_tensors_with_overlapping_strides_are_refused(tmp_path: Path, examples: int) -> None:
    """A tensor is read only if its elements do not overlap in the storage, and then equals NumPy's indexing."""
    numbers = np.arange(12, dtype=np.float32)
    dims = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), max_size=3)

    @for_all(examples, dims, st.integers(0, 12))
    def check(shape: list[tuple[int, int]], offset: int) -> None:
        size, stride = tuple(n for n, _ in shape), tuple(step for _, step in shape)
        places = [offset + sum(i * step for i, step in zip(index, stride, strict=True)) for index in np.ndindex(size)]
        if max(places, default=0) >= 12:
            return  # torch refuses to create such a view
        torch.save({"x": torch.from_numpy(numbers).as_strided(size, stride, offset)}, tmp_path / "x.pt")
        if error_message(lambda: read_torch_file(tmp_path / "x.pt")) is None:
            assert len(set(places)) == len(places)
            found = read_torch_file(tmp_path / "x.pt")["x"]
            assert (found.shape, found.flatten().tolist()) == (size, [float(place) for place in places])
        elif len(set(places)) == len(places):  # refused although no elements overlap: the strides interleave
            steps = sorted(zip(stride, size, strict=True))
            reach = np.cumsum([0, *((n - 1) * step for step, n in steps)])
            assert any(step <= reach[i] for i, (step, n) in enumerate(steps) if n > 1)

    square = torch.zeros(3, 4, 5, 6)
    for layout in (
        square,
        square.permute(2, 0, 3, 1),
        square[::2, :, 1:],
        square.to(memory_format=torch.channels_last),
    ):
        torch.save({"x": layout}, tmp_path / "x.pt")
        assert read_torch_file(tmp_path / "x.pt")["x"].shape == layout.shape


SHARED = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.builds(
        lambda value, times, kind: {str(i): value for i in range(times)} if kind is dict else kind([value] * times),
        inner,
        st.integers(0, 3),
        st.sampled_from([list, tuple, dict]),
    ),
    max_leaves=20,
)


def is_tree(value: Any, seen: set[int]) -> bool:
    """Return whether no nonempty container occurs twice and all numbers fit into 64 bits."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**64
    if not isinstance(value, (list, tuple, dict)) or not value:
        return True
    if id(value) in seen:
        return False
    seen.add(id(value))
    return all(is_tree(item, seen) for item in (value.values() if isinstance(value, dict) else value))


@draws(100, 4000)
def test_shared_containers_are_refused(tmp_path: Path, examples: int) -> None:
    @for_all(examples, SHARED)
    def check(value: Any) -> None:
        torch.save([value], tmp_path / "x.pt")
        message = error_message(lambda: read_torch_file(tmp_path / "x.pt"))
        assert (message is None) == is_tree([value], set())
        if message is None:
            assert repr(read_torch_file(tmp_path / "x.pt")) == repr([value])


# --- configurations that do not match the tensors


GENERATOR: dict[str, dict[str, Any]] = {
    "widths": {"widths": [8192, 8192]},
    "mapping": {"mapping_layers": 1000, "w_dim": 8192},
    "latents": {"z_dim": 2**20, "w_dim": 2**20},
    "classes": {"c_dim": 2**20},
    "blocks": {"widths": [8] * 900, "layers": [1000] * 900},
    "a stage of blocks": {"layers": [900, 900]},
    "grid": {"base": [2**20, 2**20]},
    "grids": {"widths": [8] * 900, "layers": [1] * 900},
    "channels": {"img_channels": 2**20},
    "Linformer": {"linformer": True, "linformer_k": 2**20, "linformer_min_tokens": 1},
}


@pytest.mark.parametrize("name", GENERATOR)
def test_networks_wider_than_their_tensors_are_not_built(name: str, tmp_path: Path) -> None:
    content = payload()
    content["config"]["generator"] |= GENERATOR[name]
    path = tmp_path / "wide.pkl"
    assert str(path) in assert_refused(lambda: snapshot.restore_network(content, path))
    if name in ("widths", "blocks"):
        write_file(path, snapshot.FORMAT, snapshot.VERSION, content)
        assert str(path) in assert_refused(lambda: snapshot.load_network(path))
        with bounded_memory():
            error_message(lambda: legacy.describe(path))


@pytest.mark.slow
def test_outlines_equal_networks_on_the_meta_device() -> None:
    """Names, shapes and types of every family."""
    env = Environment(img_shape=(3, 32, 32), c_dim=3)
    for part, families in (("generator", GENERATORS), ("discriminator", DISCRIMINATORS)):
        for family in families:
            changes: dict[str, Any] = {f"{part}.family": family}
            changes |= {"generator.handover": 16} if family == "styleformer-c" else {}
            config = getattr(resolve(override(PRESETS["tiny"], changes), env), part)
            with torch.device("meta"):
                expected = config.build()
            found = snapshot.outline(config, "x")
            for tensors, others in (
                (found.named_parameters(), expected.named_parameters()),
                (found.named_buffers(), expected.named_buffers()),
            ):
                assert [(name, x.shape, x.dtype, x.device) for name, x in tensors] == [
                    (name, x.shape, x.dtype, x.device) for name, x in others
                ]


def test_networks_with_large_buffers_are_refused(tmp_path: Path) -> None:
    """The resampling matrices of TransGAN grow with the square of the grid side and are not stored in the file."""
    content = payload()
    stages = {"base": [1, 2**15], "widths": [4, 4], "layers": [1, 1], "num_heads": 1, "z_dim": 4, "w_dim": 4}
    options = {"attention": "nystrom", "landmarks": 1, "position": "absolute", "c_dim": 0}
    family = to_json(replace(read_config(content["config"]), generator=TransGANConfig()))["generator"]
    content["config"]["generator"] = {**family, **stages, **options}
    path = tmp_path / "long.pkl"
    write_file(path, snapshot.FORMAT, snapshot.VERSION, content)
    assert_refused(lambda: snapshot.load_network(path), "buffer elements besides its weights")


def test_outlines_import_no_compiler() -> None:
    """A separate process is needed, because other tests import the compiler."""
    subprocess.run([sys.executable, "-c", OUTLINES], check=True, timeout=PATIENCE)


OUTLINES = """
import sys
from training.config import PRESETS, Environment, resolve
from training.snapshots.snapshot import outline

for name in ("auto", "stylegan2", "styleformer-c256", "transgan-celebahq256", "r3gan-ffhq256"):
    config = resolve(PRESETS[name], Environment(img_shape=(3, 256, 256), c_dim=0))
    outline(config.generator, "G")
    outline(config.discriminator, "D")
assert "torch._dynamo" not in sys.modules
assert "torch._inductor" not in sys.modules
"""


# --- numbers


NUMBERS: dict[str, Any] = {
    "400 digits": HUGE,
    "-400 digits": -HUGE,
    "5000 digits": 10**5000,
    "2^63": 2**63,
    "-2^63": -(2**63),
    "inf": float("inf"),
    "-inf": float("-inf"),
    "nan": float("nan"),
    "1e39": 1e39,
    "-1e300": -1e300,
}
FIELDS = [
    (part, name)
    for part in ("run", "origin", "augment", "g_optimizer", "ema", "loss", "generator")
    for name in (
        "total_kimg",
        "tick_kimg",
        "kimg",
        "ada_kimg",
        "lr",
        "rampup",
        "r1_gamma",
        "snapshot_ticks",
        "num_gpus",
        "conv_clamp",
        "timeout",
        "keep_every",
        "max_p",
        "copied_g",
        "z_dim",
        "workers",
    )
]


@pytest.mark.parametrize("name_of_number", NUMBERS)
def test_invalid_numbers_in_a_configuration_are_refused(name_of_number: str) -> None:
    number = NUMBERS[name_of_number]
    config = to_json(read_config(payload()["config"]))
    tried = 0
    for part, name in FIELDS:
        if name in config[part] and (abs(number) != 2**63 or isinstance(config[part][name], int)):
            strange = {**config, part: {**config[part], name: number}}
            message = error_message(partial(read_config, strange))
            assert message is not None
            assert f"{part}.{name}=" in message
            tried += 1
    assert tried > 3


@pytest.mark.parametrize("key", ["nimg", "ada_p"])
def test_invalid_numbers_in_a_snapshot_are_refused(key: str) -> None:
    content = payload()
    numbers = [
        "400 digits",
        "5000 digits",
        "inf",
        "-inf",
        "nan",
        "-1e300",
        *(["2^63", "1e39"] if key == "nimg" else []),
    ]
    for value in [*(NUMBERS[name] for name in numbers), -1, "5", None, [[]], {}]:
        message = assert_refused(partial(snapshot.parts_of, {**content, key: value}, Path("x.pkl")))
        assert message.startswith(f"x.pkl: {key}=")


def test_snapshots_without_networks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    kinds: list[Any] = [{}, [], None, {"other": {}}]
    for networks in kinds:
        write_file(path, snapshot.FORMAT, snapshot.VERSION, {**payload(), "networks": networks})
        assert_refused(lambda: snapshot.load_network(path), f"{path}: contains no networks")
        assert_refused(lambda: legacy.describe(path), f"{path}: contains no networks")
    discriminator = {"D": payload()["networks"]["D"]}
    write_file(path, snapshot.FORMAT, snapshot.VERSION, {**payload(), "networks": discriminator})
    assert run(generate.main, f"--network={path}", "--seeds=0", f"--outdir={tmp_path / 'out'}", "--device=cpu") == 2
    assert run(legacy.main, "info", str(path)) == 0
    assert not (tmp_path / "out").exists()


# --- folders of safetensors


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("safetensors", reason="safetensors is an optional package")
    path = tmp_path_factory.mktemp("folders") / "good"
    save_folder(path, replace(snapshot.load_network(SNAPSHOT), G=None, D=None))
    return path


def safetensors_file(dtype: str, bits: int, shape: list[int] | None = None) -> bytes:
    """Make a file with one tensor of 16 numbers."""
    size = 16 * bits // 8
    tensors = {"mapping.w_avg": {"dtype": dtype, "shape": shape or [16], "data_offsets": [0, size]}}
    header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


def with_deep_value(key: str, levels: int) -> Callable[[str], str]:
    return lambda text: text.replace(f'"{key}":', f'"{key}": {"[" * levels + "]" * levels}, "_{key}":', 1)


def with_value(key: str, value: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        lines = [f'  "{key}": {value},' if line.startswith(f'  "{key}": ') else line for line in text.splitlines()]
        return "\n".join(lines)

    return change


DOCUMENTS: dict[str, tuple[Callable[[str], str], str]] = {
    "a deep document": (lambda _: "[" * 100_000, "nested too deep"),
    "a deep value": (with_deep_value("nimg", 50_000), "nested too deep"),
    "a deep seed": (with_deep_value("seed", 960), ""),
    "deep labels": (lambda text: text.replace('"nimg":', f'"labels": {"[" * 960 + "]" * 960}, "nimg":', 1), ""),
    "400 digits": (with_value("nimg", str(HUGE)), "more than 64 bits"),
    "5000 digits": (with_value("nimg", "1" * 5000), "more than 64 bits"),
    "infinite nimg": (with_value("nimg", "Infinity"), "nimg=inf"),
    "ada_p of 400 digits": (with_value("ada_p", str(HUGE)), "more than 64 bits"),
    "NaN as ada_p": (with_value("ada_p", "NaN"), "ada_p=nan"),
    "version 0": (with_value("version", "0"), "format version 0, but the first is 1"),
    "version -3": (with_value("version", "-3"), "format version -3"),
    "version true": (with_value("version", "true"), "not a file of this project"),
    "version of 30 digits": (with_value("version", "9" * 30), "more than 64 bits"),
    "not text": (lambda _: "\0" * 100, "not JSON"),
    "no networks": (lambda text: json.dumps({**json.loads(text), "files": {}}), "contains no networks"),
}


def copy_folder(good_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    shutil.copytree(good_folder, path)
    return path


@pytest.mark.parametrize("name", DOCUMENTS)
def test_malformed_config_json_of_a_folder_is_refused(name: str, good_folder: Path, tmp_path: Path) -> None:
    change, text = DOCUMENTS[name]
    path = copy_folder(good_folder, tmp_path)
    (path / "config.json").write_text(change((path / "config.json").read_text()))
    for read in (load_folder, legacy.describe, legacy.transfer_options):
        assert str(path) in assert_refused(partial(read, path), text)


TYPES = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "C64": 64}
TYPES |= {"U16": 16, "U64": 64, "BOOL": 8, "F16": 16, "BF16": 16, "F64": 64, "X": 8, "": 8, "I4": 4}


@pytest.mark.parametrize("dtype", TYPES)
def test_unsupported_safetensors_types_are_refused(dtype: str, good_folder: Path, tmp_path: Path) -> None:
    """Types missing in torch, types that no network here uses, and invalid type names."""
    path = copy_folder(good_folder, tmp_path)
    data = safetensors_file(dtype, TYPES[dtype])
    (path / "G_ema.safetensors").write_bytes(data)
    document = json.loads((path / "config.json").read_text())
    document["files"] = {"G_ema": hashlib.sha256(data).hexdigest()}
    (path / "config.json").write_text(json.dumps(document))
    for read in (load_folder, legacy.describe):
        assert_refused(partial(read, path), f"{path / 'G_ema.safetensors'}: ")
    direction = tmp_path / "d.safetensors"
    direction.write_bytes(data)
    assert_refused(lambda: read_direction(f"{direction}:0", None), f"--direction={direction}:0: ")


# --- arrays


def header(shape: Any, descr: str = "<f4", body: bytes = bytes(64)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + body


def array(x: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, x)
    return file.getvalue()


ARRAYS: dict[str, dict[str, bytes]] = {
    "compressed zeros": {"w.npy": array(np.zeros(2**23 + 2**20))},
    "many compressed arrays": {f"{i}.npy": array(np.zeros(2**20)) for i in range(9)},
    "10^12 numbers": {"w.npy": header((10**12,))},
    "10^30 numbers": {"w.npy": header((10**10,) * 3)},
    "negative shape": {"w.npy": header((-4, -4))},
    "elements of zero size": {"w.npy": header((10**12,), "|V0", b"")},
    "elements of 2 GB": {"w.npy": header((1,), f"|V{2**31 - 1}")},
    "empty array with a side of 10^13": {"w.npy": header((0, 1483, 10**13), "<i2", b"")},
    "objects": {"w.npy": header((2,), "|O")},
    "too few bytes": {"w.npy": header((16, 2))},
    "no header": {"w.npy": b"\x93NUMPY\x01\0"},
    "other version": {"w.npy": b"\x93NUMPY\x07\0" + bytes(80)},
    "long header": {"w.npy": b"\x93NUMPY\x02\0\xff\xff\xff\x7f" + b" " * 99},
    "program in the header": {"w.npy": b"\x93NUMPY\x01\0\x20\0" + b"__import__('os').mkdir('x')".ljust(32)},
    "no arrays": {},
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_claiming_more_than_they_hold_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in ARRAYS[name].items():
            archive.writestr(member, data)
    G = SimpleNamespace(w_dim=16, num_ws=2)
    assert_refused(lambda: read_styles(path, G), f"--projected-w={path}: ")
    assert_refused(lambda: read_direction(f"{path}:0", None), f"--direction={path}:0: ")


@draws(60, 3000)
def test_arrays_of_any_shape_equal_numpy_or_are_refused(tmp_path: Path, examples: int) -> None:
    """Drawn shapes are both close to and far from the size of the content."""
    sizes = st.lists(st.integers(0, 6) | st.integers(-2, 10**13), max_size=4)
    kinds = st.sampled_from(["<f4", ">f8", "<i2", "|b1", "|O", "<U3", "|V0", "<c8", "<f2"])
    path = tmp_path / "w.npz"

    @for_all(examples, sizes, kinds, st.integers(0, 64), st.booleans())
    def check(shape: list[int], kind: str, length: int, is_packed: bool) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if is_packed else zipfile.ZIP_STORED) as archive:
            archive.writestr("w.npy", header(tuple(shape), kind, bytes(range(length))))
        G = type("G", (), {"w_dim": shape[-1] if shape else 0, "num_ws": shape[1] if len(shape) > 1 else 0})
        message = error_message(lambda: read_styles(path, G))
        assert message is None or message.startswith(f"--projected-w={path}: ")
        if message is None:
            expected = np.load(path)["w"].astype(np.float32)
            assert np.array_equal(read_styles(path, G).numpy(), expected)

    ws = torch.randn(5, 3, 4)
    save_styles(path, ws)
    assert torch.equal(read_styles(path, type("G", (), {"w_dim": 4, "num_ws": 3})), ws)


# --- foreign snapshots


NAMES = [
    "b123456_0",
    "b0_0",
    "b-1_0",
    "b08_0",
    "b8_00",
    "b8_1000",
    "b²_0",
    "b8_²",
    "b٨_0",
    "b8_\N{ARABIC-INDIC DIGIT ZERO}",
    "b1000000000_0",
]
NAMES += [
    "b99999_0",
    "b" + "9" * 80 + "_0",
    "b8_-1",
    "b8.5_0",
    "b_0",
    "b8_",
    "b1e3_0",
    "b3_0",
    "b12_0",
    "b32_0",
    "b16_9",
]


def write_foreign(path: Path, tensors: dict[str, Any], entries: Any = None, **arguments: Any) -> Path:
    """Write a foreign Styleformer with extra tensors, arguments and entries; arguments can be pickled only once."""
    own, theirs = styleformer()
    return write(path, {"G_ema": module("Generator", {**own, **tensors}, **{**theirs, **arguments}), **(entries or {})})


@pytest.mark.parametrize("name", ["b123456_0", "b8_\N{SUPERSCRIPT TWO}", "b1e3_0"])
def test_foreign_tensor_names_without_valid_sizes_are_refused(name: str, tmp_path: Path) -> None:
    path = write_foreign(tmp_path / "x.pkl", {f"synthesis.{name}.proj_weight": torch.zeros(2, 2)})
    assert str(path) in assert_refused(partial(legacy.load_network, path))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_foreign_tensor_names_with_invalid_numbers_are_refused(name: str, tmp_path: Path) -> None:
    for tail in ("proj_weight", "enc.q_weight", "x"):
        key = f"synthesis.{name}.{tail}"
        path = write_foreign(tmp_path / "x.pkl", {key: torch.zeros(2, 2)})
        assert str(path) in assert_refused(partial(legacy.load_network, path))
    tensors, arguments = styleformer()
    others = {key: x for key, x in tensors.items() if not key.startswith("synthesis.b")} | {key: torch.zeros(2, 2)}
    path = write(tmp_path / "y.pkl", {"G_ema": module("Generator", others, **arguments)})
    assert str(path) in assert_refused(partial(legacy.load_network, path))


@draws(20, 2000)
def test_drawn_foreign_networks_are_read_or_refused_in_one_line(tmp_path: Path, examples: int) -> None:
    """The names of tensors and the arguments of networks are drawn."""
    digits = st.integers(-2, 40).map(str) | st.text("0123456789²-_.", max_size=7) | st.sampled_from(["8", "16", "0"])
    others: dict[str, Any] = {**NUMBERS, "true": True, "none": None, "text": "x", "list": [], "lists": nested(list)}
    others["tuples"] = nested(tuple)  # drawn by name, because hypothesis prints the elements that it samples from
    values = st.sampled_from(list(others)) | st.integers()
    keys = st.sampled_from(["z_dim", "c_dim", "w_dim", "img_resolution", "img_channels", "x", "mapping_kwargs"])

    @for_all(examples, digits, digits, keys, values, st.sampled_from(["name", "argument", "synthesis", "mapping"]))
    def check(side: str, index: str, key: str, which: Any, kind: str) -> None:
        value, path = others.get(which, which), tmp_path / "x.pkl"
        if kind == "name":
            write_foreign(path, {f"synthesis.b{side}_{index}.x": torch.zeros(1)})
        elif kind == "argument":
            write_foreign(path, {}, **{key: value})
        elif kind == "synthesis":
            names = ("depth", "conv_clamp", "minimum_head", "num_layers", "linformer", "num_fp16_res", "G_dict")
            write_foreign(path, {}, synthesis_kwargs=easy_dict(**{"depth": 4, names[len(side + index) % 7]: value}))
        else:
            write_foreign(path, {}, mapping_kwargs=easy_dict(**{"num_layers": 2, "w_avg_beta": value}))
        message = error_message(partial(legacy.load_network, path))
        assert message is None or (str(path) in message and "\n" not in message)
        assert message is not None or kind != "name"

    assert not error_message(lambda: legacy.load_network(write_foreign(tmp_path / "x.pkl", {})))


def test_shared_containers_in_foreign_entries_are_skipped(tmp_path: Path) -> None:
    """Entries of a fork, with up to 2^40 values, are not needed to generate images."""
    shared: dict[str, Any] = {
        "more": nested(list),
        "augment_pipe": nested(dict),
        "training_set_kwargs": easy_dict(path=nested(tuple)),
    }
    path = write_foreign(tmp_path / "x.pkl", {}, shared)
    with bounded_memory():
        assert set(legacy.load_network(path).left_out) == {"more", "augment_pipe"}
        assert legacy.describe(path)["left_out"].keys() == {"more", "augment_pipe"}
    for key, value in (("x", nested(list)), ("img_resolution", nested(tuple)), ("z_dim", 10**5000)):
        bad = write_foreign(tmp_path / "y.pkl", {}, **{key: value})
        assert_refused(partial(legacy.load_network, bad), key)
    long = write_foreign(tmp_path / f"network-snapshot-{'9' * 200}.pkl", {})
    assert legacy.load_network(long).nimg == 0


def test_gaps_in_the_pickle_memo_allocate_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    puts = b"".join(b"K\x01r" + struct.pack("<I", 2**31 - 1 - 2**20 * i) + b"a" for i in range(1000))
    path.write_bytes(b"\x80\x04]" + puts + b".")
    assert_refused(lambda: legacy.load_network(path), "no G_ema")
    rewritten = tmp_path / "ours.pkl"
    shutil.copy(SNAPSHOT, rewritten)
    rewrite(rewritten, lambda name, data: b"\x80\x02]" + puts + b"." if name.endswith("data.pkl") else data)
    assert_refused(lambda: legacy.load_network(rewritten), "not a file of this project")


# --- DINOv2


DINOV2 = {"hidden_size": 32, "num_hidden_layers": 2, "patch_size": 14, "num_attention_heads": 4, "image_size": 28}
CONFIGS: dict[str, Any] = {
    **{
        f"{name}={value!r:.9}": {**DINOV2, name: value}
        for name in DINOV2
        for value in (10**9, 0, -1, 1.5, "x", True, [7])
    },
    "mlp_ratio": {**DINOV2, "mlp_ratio": 10**9},
    "10^400": {**DINOV2, "hidden_size": HUGE},
    "empty": {},
    "list": [],
    "null": None,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_invalid_dinov2_configurations_are_refused(name: str, tmp_path: Path) -> None:
    """Invalid configurations are refused before the network is built."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    assert_refused(lambda: read_detectors((str(tmp_path),)).identity("dinov2"), str(tmp_path))


@pytest.mark.slow
def test_dinov2_wider_than_its_weights_is_not_built(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is an optional package")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    setup = read_detectors((str(tmp_path),))
    for change in ({"hidden_size": 8192, "num_attention_heads": 1}, {"num_hidden_layers": 200}, {"image_size": 4096}):
        (tmp_path / "config.json").write_text(json.dumps({**DINOV2, **change}))
        assert_refused(
            lambda: setup.load("dinov2", torch.device("cpu")),
            "holds 2 parameters, but config.json describes a network of",
        )
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert_refused(lambda: setup.load("dinov2", torch.device("cpu")), "nested too deep")


# --- tables and shards


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is an optional package")
    file = io.BytesIO()
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    importlib.import_module("pyarrow.parquet").write_table(table, file, **options)
    return file.getvalue()


def arrow(columns: dict[str, Any], compression: str | None = None) -> bytes:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is an optional package")
    table, file = columns if isinstance(columns, pa.Table) else pa.table(columns), io.BytesIO()
    with pa.ipc.new_stream(file, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    return file.getvalue()


def arrow_with_false_row_count(count: int) -> bytes:
    """Make an Arrow file with a false number of rows and a single column without bytes."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is an optional package")
    return arrow({"image": pa.nulls(12345)}).replace(struct.pack("<q", 12345), struct.pack("<q", count))


def nested_columns(levels: int) -> bytes:
    """Make a Parquet file without rows and with a single column nested in the given number of groups."""
    group, leaf = b"\x35\0\x18\1a\x15\2\0", b"\x15\x0c\x25\2\x18\1a\0"
    count = bytes([levels + 2 & 127 | 128, levels + 2 >> 7 & 127 | 128, levels + 2 >> 14])
    return with_footer(b"\x15\2\x19\xfc" + count + b"\x48\1r\x15\2\0" + group * levels + leaf + b"\x16\0\x19\x0c\0")


def with_footer(footer: bytes) -> bytes:
    return b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1"


def shard(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def far_offsets() -> bytes:
    """Make an Arrow file with offsets beyond the end of the values."""
    return arrow({"image": [b"abc", b"defgh"]}).replace(struct.pack("<3i", 0, 3, 8), struct.pack("<3i", 0, 3, 1 << 30))


ZEROS = 70 << 20
END = 2 * tarfile.BLOCKSIZE  # number of zero bytes at the end of a tar archive
TABLES: dict[str, tuple[str, Callable[[], bytes], str]] = {  # file name, content, text of the message
    "zeros": ("x.parquet", lambda: parquet({"image": [bytes(ZEROS)]}, compression="zstd"), "a page unpacks to"),
    "labels of zeros": (
        "x.parquet",
        lambda: parquet({"image": [b""], "label": ["0" * ZEROS]}, compression="zstd"),
        "a page unpacks to",
    ),
    "rows": ("x.parquet", lambda: parquet({"image": [b""] * 100_000}), "100000 rows, more rows than bytes"),
    "prefixes": (
        "x.parquet",
        lambda: parquet(
            {"image": [b"a" * 9999] * 999}, use_dictionary=False, column_encoding={"image": "DELTA_BYTE_ARRAY"}
        ),
        "DELTA_BYTE_ARRAY",
    ),
    "nested": ("x.parquet", lambda: nested_columns(2000), "more than 1000 group columns"),
    "lists": ("x.parquet", lambda: with_footer(b"\x15\2\x19\xfc" + b"\xff" * 8 + b"\x7f"), "truncated"),
    "structs in structs": ("x.parquet", lambda: with_footer(b"\x1c" * 100_000), "nested too deep"),
    "no footer": ("x.parquet", lambda: b"PAR1" + bytes(100), "not a complete Parquet file"),
    "long footer": ("x.parquet", lambda: b"PAR1" + b"\xff\xff\xff\x7fPAR1", "not a complete Parquet file"),
    "empty": ("x.arrow", bytes, "cannot be read"),
    "no schema": ("x.arrow", lambda: bytes(100), "cannot be read"),
    "compressed": ("x.arrow", lambda: arrow({"image": [bytes(ZEROS)]}, "zstd"), "it is compressed"),
    "false number of rows": ("x.arrow", lambda: arrow_with_false_row_count(1 << 40), "rows, more rows than bytes"),
    "offsets": ("x.arrow", far_offsets, "cannot be read"),
    "false member size": ("x.tar", lambda: shard("0.png", 7 << 30), "is damaged (it is truncated)"),
    "compressed zeros": (
        "x.tar.gz",
        lambda: gzip.compress(shard("0.png", 1 << 30) + bytes(ZEROS), 1),
        "unpacks to more",
    ),
    "label": (
        "x.tar",
        lambda: shard("0.png", 0) + shard("0.cls", 1 << 21) + bytes((1 << 21) + END),
        "2097152 bytes, more than",
    ),
    "deeply nested label": (
        "x.tar",
        lambda: shard("0.png", 0) + shard("0.json", 1 << 19) + b"[" * (1 << 19) + bytes(END),
        "cannot be read",
    ),
    "truncated label": ("x.tar", lambda: shard("0.json", 1 << 19) + b"{", "is damaged (it is truncated)"),
    "name": ("x.tar", lambda: shard("n", 7 << 30, tarfile.GNUTYPE_LONGNAME), "is damaged"),
    "record": ("x.tar", lambda: shard("n", 8, tarfile.XHDTYPE) + b"0 path=a".ljust(512, b"\0"), "of an unknown kind"),
}


def open_images(path: Path) -> None:
    for _ in open_source(str(path), labels_from_folders=None, drawing=Drawing(0, 1, 8, 8)):
        pass


@pytest.mark.parametrize("name", TABLES)
def test_tables_claiming_more_than_they_hold_are_refused(name: str, tmp_path: Path) -> None:
    file, content, text = TABLES[name]
    (tmp_path / file).write_bytes(content())
    assert file in assert_refused(lambda: open_images(tmp_path / file), text)


@draws(150, 4000)
def test_corrupt_tables_and_shards_get_one_error_message(tmp_path: Path, examples: int) -> None:
    columns = {"image": [{"bytes": bytes([k]) * k, "path": None} for k in range(9)], "label": list(range(9))}
    files = {
        "x.parquet": parquet(columns),
        "y.parquet": parquet(columns, compression="gzip", row_group_size=2, data_page_version="2.0"),
        "x.arrow": arrow(columns),
        "x.tar": b"".join(shard(f"{k}.png", 9) + bytes(512) + shard(f"{k}.cls", 1) + b"1".ljust(512) for k in "abc")
        + bytes(END),
    }

    @for_all(examples, st.sampled_from(sorted(files)), CORRUPTION)
    def check(name: str, corruption: Any) -> None:
        (tmp_path / name).write_bytes(corrupted(files[name], corruption))
        error_message(lambda: open_images(tmp_path / name))


class MakesFolder:
    """Object that creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:pickle-based deserialization")  # old versions of pyarrow refuse with this warning
@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_a_pickle_in_a_table_schema_is_not_executed(suffix: str, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is an optional package")
    program = pickle.dumps(MakesFolder(tmp_path / "made"))
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": program}
    table = pa.table([[b"x"]], pa.schema([pa.field("image", pa.binary(), metadata=metadata)]))
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(arrow(table) if suffix == "arrow" else parquet(table))
    error_message(lambda: open_images(path))
    assert not (tmp_path / "made").exists()
    pickle.loads(program)
    assert (tmp_path / "made").exists()


# --- pipes and corrupt runs


def test_pipes_as_network_files_do_not_block(tmp_path: Path, good_folder: Path) -> None:
    """Every command that reads snapshots refuses pipes and devices."""
    for name in ("x.pkl", "x.pt", "x.npz", "x.safetensors", "x"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "zero.pkl").symlink_to("/dev/zero")
    common = ["--device=cpu", f"--outdir={tmp_path / 'out'}"]
    good = [f"--network={SNAPSHOT}", "--class=0", *common]
    data = f"--data={DATA / 'shapes.zip'}"
    for name in ("x.pkl", "x.pt", "x", "zero.pkl"):
        path = tmp_path / name
        assert run(generate.main, f"--network={path}", "--seeds=0", *common) == 2
        assert run(legacy.main, "info", str(path)) == 2
        assert run(legacy.main, "convert", f"--source={path}", f"--dest={tmp_path / 'new'}") == 2
        assert run(train.main, f"--resume={path}", data, "--cfg=tiny", "--metrics=none", *common) == 2
        assert run(calc_metrics.main, f"--network={path}", "--metrics=swd20", "--device=cpu") == 2
    for name in ("x.npz", "zero.pkl"):
        assert run(generate.main, f"--projected-w={tmp_path / name}", *good) == 2
    for name in ("x.npz", "x.safetensors"):
        assert run(generate.main, "--seeds=0", f"--direction={tmp_path / name}:0", *good) == 2
    broken = copy_folder(good_folder, tmp_path)
    for name in ("G_ema.safetensors", "config.json"):
        (broken / name).unlink()
        os.mkfifo(broken / name)
        assert run(legacy.main, "info", str(broken)) == 2
    assert not (tmp_path / "out").exists()
    shutil.copy(SNAPSHOT, tmp_path / "good.pkl")
    os.mkfifo(tmp_path / "metric-swd.jsonl")
    assert run(legacy.main, "info", str(tmp_path / "good.pkl")) == 0


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def set_value(field: str, value: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        document = json.loads(path.read_text())
        part, _, name = field.partition(".")
        document[part][name] = "?"
        path.write_text(json.dumps(document).replace('"?"', value))

    return change


CORRUPT_FILES: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: path.unlink(),
    "a pipe": replace_by_pipe,
    "a folder": replace_by_folder,
    "a device": replace_by_device,
    "empty": lambda path: path.write_bytes(b""),
    "deep": lambda path: path.write_text("[" * 100_000),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe{}"),
}
INVALID_VALUES = {
    f"{field}={name}": set_value(field, value)
    for field in ("run.total_kimg", "origin.kimg", "augment.ada_kimg", "run.num_gpus", "run.batch_gpu", "ema.kimg")
    for name, value in (
        ("400 digits", "1" + "0" * 400),
        ("5000 digits", "9" * 5000),
        ("NaN", "NaN"),
        ("1e999", "1e999"),
    )
}
INVALID_VALUES["deep value"] = set_value("run.total_kimg", "[" * 950 + "]" * 950)
DAMAGED_RUNS = CORRUPT_FILES | INVALID_VALUES


def test_invalid_numbers_in_options_of_a_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / OPTIONS_FILE
    options = json.dumps(to_json(read_config(payload()["config"])))
    for corruption in INVALID_VALUES.values():
        path.write_text(options)
        corruption(path)
        assert_refused(lambda: resume.saved_config(tmp_path), str(path))


@pytest.mark.parametrize("name", [*CORRUPT_FILES, "run.total_kimg=NaN"])
def test_resume_latest_skips_a_run_with_corrupt_options(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = override(read_config(Checkpoint.read(STATE)["config"]), {"data.path": str(DATA / "shapes.zip")})
    for number in range(2):
        run_dir = tmp_path / f"0000{number}-run"
        run_dir.mkdir()
        shutil.copy(STATE, run_dir / "training-state-000001.pt")
        (run_dir / OPTIONS_FILE).write_text(json.dumps(to_json(config)))
    DAMAGED_RUNS[name](tmp_path / "00001-run" / OPTIONS_FILE)
    start = resume.choose_start(resume.RunRequest(outdir=tmp_path, resume="latest"))
    assert start.run_dir == tmp_path / "00000-run"
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert warnings[0].startswith(f"Warning: {tmp_path / '00001-run' / OPTIONS_FILE}: ")
