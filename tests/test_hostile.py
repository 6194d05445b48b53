"""Hostile input: every outcome is success or one clear message, without hanging, running code or overwriting files.

Hypothesis draws the same examples every time; `make test-slow` draws many more.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="hypothesis is an optional package")
import torch
from conftest import SMALL, make_shapes
from fuzzing import (
    CHANGES,
    CORRUPTION,
    DATA,
    SNAPSHOT,
    STATE,
    VALUES,
    corrupted,
    draws,
    error_message,
    for_all,
    read_all,
    run,
    with_change,
    zip_bytes,
)
from hypothesis import strategies as st
from image_helpers import encoded, png_header
from PIL import Image

import calc_metrics
import dataset_tool
import generate
import legacy
import train
from dnnlib.cli import ConfigOption
from dnnlib.config import override, to_json
from metrics.registry import is_best
from torch_utils.checkpoint import Checkpoint, digest, write_file
from training import restore
from training.config import read_config
from training.dataset import ImageDataset
from training.resume import RunRequest, choose_start
from training.snapshots import snapshot
from training.training_loop import Trainer

# --- datasets


@cache
def image_corpus() -> list[bytes]:
    """Make valid images of many modes and formats, images that cannot be decoded, and files that are not images."""
    pixels = np.random.RandomState(0).randint(0, 256, (8, 8, 4), np.uint8)
    rgba = Image.fromarray(pixels)
    corpus = [encoded(rgba.convert(mode)) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    corpus += [encoded(rgba.convert("RGB"), kind) for kind in ("JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")]
    corpus += [encoded(rgba.convert("CMYK"), "JPEG"), encoded(rgba.convert("F"), "TIFF")]
    sizes = [(0, 0), (0, 8), (8, 8), (2**31, 1), (2**32 - 1, 2**32 - 1), (100_000, 100_000)]
    corpus += [png_header(*size) for size in sizes] + [png_header(8, 8, bits=16), png_header(8, 8, kind=7)]
    corpus += [corpus[4][: len(corpus[4]) // 2], b"", b"\0" * 100, b"<svg/>", b"\x89PNG\r\n\x1a\n", os.urandom(0)]
    return corpus


@cache
def good_zip() -> bytes:
    images = [(f"00000/img{k}.png", image_corpus()[4]) for k in range(3)]
    labels = {"labels": [[name, k % 2] for k, (name, _) in enumerate(images)], "class_names": ["a", "b"]}
    return zip_bytes([*images, ("dataset.json", json.dumps(labels).encode())])


@draws(60, 1500)
def test_corrupt_zip_files_get_one_error_message(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "set.zip"
    path.write_bytes(good_zip())
    assert read_all(path) == [None, None]

    @for_all(examples, CORRUPTION)
    def check(corruption: Any) -> None:
        path.write_bytes(corrupted(good_zip(), corruption))
        read_all(path)


@draws(60, 1500)
def test_malformed_images_in_a_zip_file_get_one_error_message(tmp_path: Path, examples: int) -> None:
    members = st.lists(st.sampled_from(range(len(image_corpus()))), min_size=1, max_size=3)

    @for_all(examples, members, CORRUPTION)
    def check(chosen: list[int], corruption: Any) -> None:
        images = [(f"{k}.png", image_corpus()[index]) for k, index in enumerate(chosen)]
        images[-1] = (images[-1][0], corrupted(images[-1][1], corruption))
        path = tmp_path / "set.zip"
        path.write_bytes(zip_bytes(images))
        read_all(path)
        made = tmp_path / "made.zip"
        made.unlink(missing_ok=True)
        run(dataset_tool.main, f"--source={path}", f"--dest={made}", "--workers=1", "--skip-bad")
        if made.exists():
            assert read_all(made)[0] is None


@draws(60, 1500)
def test_malformed_dataset_json_gets_one_error_message(tmp_path: Path, examples: int) -> None:
    names = [f"00000/img{k}.png" for k in range(3)]
    good = {"labels": [[name, k] for k, name in enumerate(names)], "class_names": ["a", "b", "c"], "width": 8}
    vectors = {**good, "labels": [[name, [0.5, 1.0]] for name in names]}
    images = [(name, image_corpus()[4]) for name in names]
    raw = st.binary(max_size=20) | VALUES.map(lambda value: json.dumps(value).encode())

    def write(content: bytes) -> None:
        (tmp_path / "set.zip").write_bytes(zip_bytes([*images, ("dataset.json", content)]))

    @for_all(examples, st.sampled_from([good, vectors]), *CHANGES, st.none() | raw)
    def check(base: Any, path: list[float], value: Any, remove: bool, instead: bytes | None) -> None:
        write(json.dumps(with_change(base, path, value, remove)).encode() if instead is None else instead)
        read_all(tmp_path / "set.zip")

    deep = b"[" * 100_000
    huge = json.dumps({"labels": [[names[0], 2**31 - 1], [names[1], 0], [names[2], 10**400]]}).encode()
    for content in (deep, b'{"labels": ' + deep, huge, b"\xff\xfe{}", b"NaN"):
        write(content)
        outcome = read_all(tmp_path / "set.zip")
        assert outcome[1], content[:40]
    write(huge.replace(b"1" + b"0" * 400, b"1"))  # valid labels, but too many classes for a network
    assert read_all(tmp_path / "set.zip") == [None, None]
    common = [f"--data={tmp_path / 'set.zip'}", "--outdir=x", "--cfg=tiny", "--device=cpu", "-n"]
    assert run(train.main, *common, "--cond") == 2


def test_hostile_file_names_are_never_used_as_paths(tmp_path: Path) -> None:
    """Absolute and parent paths, duplicates, invalid UTF-8, NUL bytes, long names; links, pipes, devices in folders."""
    names = ["../../evil.png", "/etc/evil.png", "a\\b.png", "x" * 300 + ".png", "é\n.png", "-rf.png", "%s{}.png"]
    image = image_corpus()[4]
    path = tmp_path / "set.zip"
    path.write_bytes(zip_bytes([(name, image) for name in names]))
    assert read_all(path)[0] is None
    inside = tmp_path / "made"
    assert run(dataset_tool.main, f"--source={path}", f"--dest={inside}", "--workers=1") == 0
    made = sorted(str(file.relative_to(inside)) for file in inside.rglob("*.png"))
    assert made == [f"00000/img{k:08d}.png" for k in range(len(names))]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["made", "set.zip"]

    for old, new in ((b"0.png", b"\xff.png"), (b"0.png", b"\0.png"), (b"0.png", b"1.png")):
        path.write_bytes(zip_bytes([("0.png", image), ("1.png", image)]).replace(old, new))
        read_all(path)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "0.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "1.png").mkdir()
    assert "0.png" in (read_all(folder)[0] or "")
    (folder / "+.png").write_bytes(image)
    assert "2 images, 1 cannot be read, the first is '0.png' (No such file or directory): build" in (
        read_all(folder)[0] or ""
    )
    (folder / "+.png").unlink()
    (folder / "+.png").symlink_to("/dev/zero")
    assert "the first is '+.png' (not a regular file)" in (read_all(folder)[0] or "")
    os.mkfifo(folder / "#.png")  # reading it would block
    assert "the first is '#.png' (not a regular file)" in (read_all(folder)[0] or "")
    assert run(dataset_tool.main, f"--source={folder}", f"--dest={tmp_path / 'again'}", "--workers=1") == 2


def test_false_sizes_in_a_zip_allocate_no_memory(tmp_path: Path) -> None:
    """A zip directory that claims gigabytes, and a small member that unpacks to hundreds of megabytes."""
    path = tmp_path / "set.zip"
    good = zip_bytes([("0.png", image_corpus()[4])])
    size = struct.pack("<I", len(image_corpus()[4]))
    for lie in (2**32 - 2, 2**28, 1):
        path.write_bytes(good.replace(size, struct.pack("<I", lie)))
        assert read_all(path)[0]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(2**28 + 1))
    assert "more than the limit of 268435456" in (read_all(path)[0] or "")


# --- snapshots and training states


class Call:
    """Object that calls a function when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


def test_no_script_executes_code_from_a_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shapes_zip: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--device=cpu", f"--outdir={tmp_path / 'runs'}"]
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (os.system, ("mkdir pwned",)),
        (eval, ("__import__('os').mkdir('pwned')",)),
        (os.mkdir, ("pwned",)),
    ]
    document = torch.load(SNAPSHOT, weights_only=True)
    for number, (call, arguments) in enumerate(calls):
        harm = Call(call, *arguments)
        files = {f"plain{protocol}": pickle.dumps({"payload": harm}, protocol) for protocol in range(6)}
        for name, is_zip in (("torch", True), ("old-torch", False)):
            buffer = io.BytesIO()
            torch.save(
                {**document, "payload": {**document["payload"], "nimg": harm}},
                buffer,
                _use_new_zipfile_serialization=is_zip,
            )
            files[name] = buffer.getvalue()
        for name, data in files.items():
            for suffix in ("pkl", "pt"):
                path = tmp_path / f"{name}{number}.{suffix}"
                path.write_bytes(data)
                resumed = [f"--data={shapes_zip}", *SMALL, "--metrics=none", f"--resume={path}", *options]
                assert run(train.main, *resumed) == 2
            assert run(generate.main, f"--network={path}", "--seeds=0", *options) == 2
            assert run(calc_metrics.main, f"--network={path}", "--metrics=swd20", "--device=cpu") == 2
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "runs").exists()


@draws(150, 5000)
def test_corrupt_snapshots_and_states_are_refused(tmp_path: Path, examples: int) -> None:
    """A changed byte in the padding of the zip file may be harmless; the content is then equal bit for bit."""
    kinds: list[tuple[Path, Callable[[Path], Any]]] = [
        (SNAPSHOT, lambda path: snapshot.read_file(path, snapshot.FORMAT, snapshot.VERSION, snapshot.MIGRATIONS)),
        (STATE, Checkpoint.read),
    ]
    originals = [(path.read_bytes(), read, digest(read(path))) for path, read in kinds]

    @for_all(examples, st.sampled_from(range(2)), CORRUPTION)
    def check(kind: int, corruption: Any) -> None:
        data, read, expected = originals[kind]
        path = tmp_path / "file"
        path.write_bytes(corrupted(data, corruption))

        def compare() -> None:
            assert digest(read(path)) == expected

        refused = error_message(compare)
        assert refused is None or str(path) in refused


@draws(50, 1000)
def test_snapshots_and_states_with_invalid_content_are_refused(tmp_path: Path, examples: int) -> None:
    """The checksum is correct, because anyone can compute it."""
    config = read_config(Checkpoint.read(STATE)["config"])
    config = replace(config, data=replace(config.data, path=str(DATA / "shapes.zip")))
    trainer = Trainer(config, ImageDataset(config.data), torch.device("cpu"))
    state, network = Checkpoint.read(STATE), snapshot.read_file(SNAPSHOT, snapshot.FORMAT, snapshot.VERSION, {})
    path = tmp_path / "file"

    @for_all(examples, st.booleans(), *CHANGES)
    def check(is_state: bool, where: list[float], value: Any, remove: bool) -> None:
        payload = with_change(state if is_state else network, where, value, remove)
        if is_state:
            write_file(path, Checkpoint.FORMAT, Checkpoint.VERSION, payload)
            refused = error_message(lambda: trainer.resume(path))
        else:
            write_file(path, snapshot.FORMAT, snapshot.VERSION, payload)
            refused = error_message(lambda: snapshot.load_network(path))
            described = error_message(lambda: legacy.describe(path))
            assert described is None or str(path) in described
        assert refused is None or str(path) in refused

    document = torch.load(STATE, weights_only=True)
    for key in document:
        strange: list[Any] = [None, 2**70, -1, "x", [], {}, torch.zeros(1)]
        for value in strange:
            torch.save({**document, key: value}, path)
            assert error_message(lambda: Checkpoint.read(path)) is not None or key == "written_by"
        torch.save({name: value for name, value in document.items() if name != key}, path)
        assert error_message(lambda: Checkpoint.read(path))


# --- the files of a run


@draws(60, 1500)
def test_malformed_files_in_a_run_folder_get_one_error_message(tmp_path: Path, shapes_zip: Path, examples: int) -> None:
    """training_options.json is a valid configuration or refused; malformed lines of logs are skipped."""
    config = read_config(snapshot.read_file(SNAPSHOT, snapshot.FORMAT, snapshot.VERSION, {})["config"])
    config = override(config, {"data.path": str(shapes_zip)})
    run_dir = tmp_path / "00000-run"
    run_dir.mkdir()
    (run_dir / "training-state-000000.pt").touch()
    raw = st.binary(max_size=20) | VALUES.map(lambda value: json.dumps(value).encode())
    lines = st.lists(raw | st.just(b'{"Progress/kimg": 1}') | st.just(b'{"kimg": 9}'), max_size=4)

    @for_all(examples, *CHANGES, st.none() | raw, lines)
    def check(where: list[float], value: Any, remove: bool, instead: bytes | None, log: list[bytes]) -> None:
        text = json.dumps(with_change(to_json(config), where, value, remove)).encode()
        (run_dir / "training_options.json").write_bytes(text if instead is None else instead)
        for resume in ("latest", str(run_dir)):
            error_message(partial(choose_start, RunRequest(outdir=tmp_path, resume=resume)))
        (run_dir / "stats.jsonl").write_bytes(b"\n".join(log))
        restore._truncate_log(run_dir / "stats.jsonl", 5.0)
        kept = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
        assert all(entry.get("Progress/kimg", entry.get("kimg", 0)) in (0, 1, None) or entry for entry in kept)
        (run_dir / "metric-swd.jsonl").write_bytes(b"\n".join([*log, b'{"results": {"swd": "x"}}', b'{"results": 3}']))
        assert is_best({"metric": "swd", "results": {"swd": 1.0}}, run_dir, higher_is_better=False)


# --- options

WORDS = ["", "nan", "-inf", "-1", "0", "1", "0.5", "1e308", "1e-320", "9" * 30, "9" * 5000, "2147483648", "1000000"]
WORDS += [
    "1,2,3",
    ",",
    "none",
    "x",
    "../x",
    "/dev/null",
    "\udcff",
    "é\n",
    "1-3",
    "0-99999999999",
    "8x12",
    "0x0",
    "auto",
]
SKIPPED_OPTIONS = {"use_compile", "use_graphs", "help"}  # compilation and graph capture are valid but slow


def every_option(command: click.Command) -> list[str]:
    options = [option for option in command.params if isinstance(option, ConfigOption)]
    return [option.opts[0] for option in options if option.name not in SKIPPED_OPTIONS]


@pytest.fixture(scope="module")
def few_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("few") / "few.zip", 16, 24)


@draws(150, 3000)
def test_hostile_option_values_get_one_error_message(
    few_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    network = tmp_path / "network.pkl"
    network.write_bytes(SNAPSHOT.read_bytes())
    scripts: dict[str, tuple[click.Command, list[str]]] = {
        "train": (
            train.main,
            ["--outdir=work/runs", f"--data={few_shapes}", *SMALL, "--metrics=none", "--device=cpu", "-n"],
        ),
        "generate": (
            generate.main,
            [f"--network={network}", "--class=0", "--seeds=0", "--outdir=work/out", "--device=cpu"],
        ),
        "metrics": (
            calc_metrics.main,
            [f"--network={network}", f"--data={few_shapes}", "--metrics=swd20", "--device=cpu", "--no-cache"],
        ),
        "build": (
            dataset_tool.main.commands["build"],
            [f"--source={few_shapes}", "--dest=work/set.zip", "--workers=1"],
        ),
    }
    table = [(name, flag) for name, (command, _) in scripts.items() for flag in every_option(command)]
    assert len(table) > 80
    before = {path: path.read_bytes() for path in (few_shapes, network)}
    for command, arguments in scripts.values():
        assert run(command, *arguments) == 0
    numbers = st.integers(-2, 70) | st.integers() | st.sampled_from([0.1, 0.5, 1.0, 2e-3]) | st.floats()
    words = st.sampled_from(WORDS) | st.text(st.characters(exclude_characters="\0"), max_size=12)
    values = numbers.map(str) | words

    @for_all(examples, st.sampled_from(table), values)
    def check(entry: tuple[str, str], value: str) -> None:
        name, flag = entry
        command, arguments = scripts[name]
        if flag == "--gpus" and value.strip().isdigit() and int(value[:9]) <= 16:
            return  # would start that many processes
        if flag in ("--dest", "--outdir"):
            value = f"work/{value}"  # output must stay inside this folder
        (tmp_path / "work" / "set.zip").unlink(missing_ok=True)
        run(command, *arguments, f"{flag}={value}")
        assert {path: path.read_bytes() for path in before} == before


def test_pairs_of_hostile_option_values_write_nothing(few_shapes: Path, tmp_path: Path) -> None:
    """Pairs of values, drawn from a seed, reach checks of one option that depend on another option."""
    chosen = random.Random(0)
    flags = every_option(train.main)
    base = [f"--outdir={tmp_path / 'runs'}", f"--data={few_shapes}", *SMALL, "--metrics=none", "--device=cpu", "-n"]
    assert run(train.main, *base) == 0
    for _ in range(40):
        run(train.main, *base, *(f"{chosen.choice(flags)}={chosen.choice(WORDS)}" for _ in range(2)))
    assert not (tmp_path / "runs").exists()
