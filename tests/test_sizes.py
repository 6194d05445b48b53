"""Errors for images of unsuitable size or kind: the messages, and whether their advice works."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import calc_metrics
import dataset_tool
import train
from dnnlib.config import ConfigError, override
from training.config import PRESETS, Environment, TrainConfig, apply_options, resolve
from training.data_sources.sizes import build_command, candidate_sizes, describe_sizes, suggest_size
from training.networks import DISCRIMINATORS, GENERATORS

SIZES = [(32, 32), (48, 48), (64, 64), (128, 128), (96, 64), (178, 218), (500, 375)]  # width, height
INTERNAL_NAMES = "g_dict|widths|num_layers|img_size|resolutions|--d-"  # internal names that users did not specify


def size_error(config: TrainConfig, size: tuple[int, int], *, is_raw: bool = False) -> ConfigError | None:
    config = override(config, {"data.path": "a set.zip"})
    try:
        resolve(config, Environment(img_shape=(3, size[1], size[0]), c_dim=0, is_raw=is_raw))
    except ConfigError as error:
        return error
    return None


def assert_advice_works(config: TrainConfig, options: str, size: tuple[int, int], **given: object) -> None:
    """Assert that the configuration resolves with the suggested options added."""
    values = {f"generator.{name}": value for name, value in given.items()}
    for name, value in re.findall(r"--(?:set generator\.)?([\w-]+)=(\S+)", options):
        if name == "cfg":
            config = PRESETS[value]
        elif name == "gen":
            values["generator.family"] = value
        elif name == "handover":
            values["generator.handover"] = int(value)
        else:
            assert name == "base"
            sides = [int(side) for side in value.split("x")]
            values["generator.base"] = (sides[0], sides[-1])
    assert size_error(apply_options(config, values), size) is None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preset", PRESETS)
def test_size_errors_name_the_preset_and_give_working_advice(preset: str, size: tuple[int, int]) -> None:
    error = size_error(PRESETS[preset], size)
    fixed = PRESETS[preset].generator.fixed_size
    if error is None:
        assert fixed in (None, size[::-1])
        return
    width, height = size
    assert error.field == "data.path"
    assert error.problem.startswith(f"images of {width}x{height}, ")
    assert f"--cfg={preset}" in error.problem
    assert not re.search(INTERNAL_NAMES, error.problem)
    rebuilt = re.search(r"rebuild the dataset with --width=(\d+) --height=(\d+)", error.problem)
    assert rebuilt
    assert size_error(PRESETS[preset], (int(rebuilt[1]), int(rebuilt[2]))) is None
    if fixed:
        assert (int(rebuilt[2]), int(rebuilt[1])) == fixed
        assert f"--cfg={preset} is for {rebuilt[1]}x{rebuilt[2]}" in error.problem
    if " give " in error.problem:
        assert_advice_works(PRESETS[preset], error.problem.rpartition(" give ")[2], size)
    elif size not in [(178, 218), (500, 375)] and not re.search("handover|margin", str(PRESETS[preset].generator)):
        raise AssertionError(f"no options for {size}")


def test_the_size_of_a_preset_equals_the_size_in_its_name() -> None:
    """The sizes are the numbers in the names of the published models."""
    sizes = {"cifar": 32, "cifar-large": 32, "stl10-medium": 48, "celeba64-l": 64, "church128-l": 128, "tiny": 32}
    sizes |= {"transgan-cifar": 32, "transgan-stl10": 48, "transgan-celeba128": 128, "transgan-celebahq256": 256}
    assert {name: PRESETS[name].generator.fixed_size for name in sizes} == {k: (n, n) for k, n in sizes.items()}


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({}, (128, 128), "images of 128x128, and --cfg=tiny is for 32x32: rebuild the dataset with --width=32 "
         "--height=32, or give --cfg=auto"),
        ({"base": (12, 12)}, (32, 32), "images of 32x32, and --cfg=tiny with --base=12 is for 48x48: rebuild the "
         "dataset with --width=48 --height=48, or omit --base"),
        ({"base": (8, 12)}, (32, 32), "--cfg=tiny with --base=8x12 is for 48x32: rebuild the dataset with --width=48 "),
        ({"base": (12, 12)}, (96, 96), "--cfg=tiny with --base=12 is for 48x48: rebuild the dataset with --width=48 "
         "--height=48, or give --cfg=auto"),
        ({"family": "stylegan2"}, (20, 20), "images of 20x20, which the generator of --cfg=tiny with --gen=stylegan2 "
         "does not support: rebuild the dataset with --width=16 --height=16, or give --base=10"),
        ({"family": "transgan"}, (178, 218), "which the generator of --cfg=tiny with --gen=transgan does not support"),
        ({"family": "r3gan"}, (48, 48), "--cfg=tiny with --gen=r3gan does not support: rebuild the "
         "dataset with --width=32 --height=32, or give --base=12"),
        ({"family": "styleformer2"}, (50, 38), "--cfg=tiny with --gen=styleformer2 does not support: rebuild the "
         "dataset with --width=32 --height=32"),
        ({"family": "styleformer-c"}, (32, 32), "with --width=64 --height=64, or give --set generator.handover=16"),
        ({"family": "transgan", "base": (12, 12)}, (32, 32), "base=(12, 12): cannot be doubled to"),
        ({"widths": (64, 64, 64)}, (128, 128), "widths=(64, 64, 64): does not produce images of 128x128"),
        ({"widths": (64, 64, 64), "base": (12, 12)}, (32, 32), "widths=(64, 64, 64): does not produce images of 32x32"),
    ],
)  # fmt: skip
def test_size_errors_name_only_the_given_options(
    options: dict[str, object], size: tuple[int, int], message: str
) -> None:
    config = apply_options(PRESETS["tiny"], {f"generator.{name}": value for name, value in options.items()})
    error = size_error(config, size)
    assert error
    assert message in str(error)
    if " give " in str(error):
        assert_advice_works(PRESETS["tiny"], str(error).rpartition(" give ")[2], size, **options)


@pytest.mark.parametrize(
    ("family", "options", "size", "message"),
    [
        ("transgan", {}, (18, 18), "images of 18x18, which the discriminator of --cfg=transgan-cifar with "
         "--gen=stylegan2 --base=9 does not support"),
        ("stylegan2", {}, (9, 9), "which the discriminator of --cfg=transgan-cifar with --gen=stylegan2 --base=9"),
        ("r3gan", {}, (9, 9), "which the discriminator of --cfg=transgan-cifar with --gen=stylegan2 --base=9"),
        ("r3gan", {"widths": (32, 32, 32)}, (18, 18), "one entry per grid, 2 for images of 18x18"),
        ("styleformer", {"patch": 4}, (18, 18), "patch=4: does not divide images of 18x18"),
    ],
)  # fmt: skip
def test_size_errors_of_the_discriminator_name_the_options(
    family: str, options: dict[str, object], size: tuple[int, int], message: str
) -> None:
    values: dict[str, object] = {
        "generator.family": "stylegan2",
        "generator.base": (9, 9),
        "discriminator.family": family,
    }
    values |= {f"discriminator.{name}": value for name, value in options.items()}
    error = size_error(apply_options(PRESETS["transgan-cifar"], values), size)
    assert error
    assert message in str(error)


def test_all_families_are_covered() -> None:
    """A new family needs test cases above."""
    assert set(GENERATORS) == {
        "styleformer",
        "stylegan2",
        "styleformer-c",
        "styleformer2",
        "transgan",
        "r3gan",
        "stylegan3",
        "styleformer-a",
    }
    assert set(DISCRIMINATORS) == {"stylegan2", "styleformer", "transgan", "r3gan"}


def test_raw_images_get_the_complete_build_command() -> None:
    error = size_error(PRESETS["tiny"], (178, 218), is_raw=True)
    assert error
    command = "python dataset_tool.py '--source=a set.zip' '--dest=data/a set.zip' --transform=center-crop --width=32"
    assert f": build a dataset of another size: {command} --height=32" in error.problem


# --- folders of raw images


def write_images(folder: Path, sizes: list[tuple[int, int]], modes: str = "RGB", suffix: str = ".png") -> Path:
    folder.mkdir(parents=True)
    noise = np.random.RandomState(0)
    for number, (width, height) in enumerate(sizes):
        pixels = noise.randint(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).convert(modes.split()[number % len(modes.split())]).save(
            folder / f"{number:03d}{suffix}"
        )
    return folder


def train_error(*arguments: str) -> str:
    result = CliRunner().invoke(train.main, ["--outdir=runs", "--device=cpu", "-n", *arguments])
    assert result.exit_code == 2, result.output
    assert len(result.output.splitlines()) == 1
    return result.output.strip()


MIXED = [(120, 90), (400, 300), (300, 333), (80, 120), (64, 200)] * 2


@pytest.mark.parametrize(
    ("sizes", "modes", "suffix", "options", "found", "added"),
    [
        (MIXED, "RGB", ".jpg", [], "10 images of 5 sizes, 80x120 to 400x300 pixels", "64"),
        (MIXED, "RGB", ".png", ["--cfg=tiny"], "10 images of 5 sizes, 80x120 to 400x300 pixels", "32"),
        (MIXED, "RGB", ".png", ["--base=12"], "10 images of 5 sizes", "48"),
        (MIXED, "RGB", ".png", ["--cfg=tiny", "--g_dict=16,16", "--num_layers=1,1"], "10 images of 5 sizes", "16"),
        (MIXED, "RGB L", ".webp", [], "10 images of 5 sizes", "64"),
        ([(33, 40)] * 4, "RGB", ".bmp", [], "images of 33x40, which the generator of --cfg=auto does not", "32"),
        (
            [(32, 32)] * 4,
            "L RGB",
            ".png",
            ["--cfg=tiny"],
            "4 images, 2 grayscale, 2 RGB: build a dataset of one kind",
            "",
        ),
        (
            [(32, 32)] * 20,
            "RGB " * 19 + "RGBA",
            ".png",
            [],
            "20 images, 19 RGB, 1 RGBA, the first different image is '019.png'",
            "",
        ),
    ],
)
def test_the_suggested_command_builds_a_trainable_dataset(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sizes: list[tuple[int, int]],
    modes: str,
    suffix: str,
    options: list[str],
    found: str,
    added: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("my photos"), sizes, modes, suffix)
    message = train_error("--data=my photos", *options)
    assert message.startswith(f"Error: --data=my photos: {found}")
    command = message[message.index("python dataset_tool.py ") :].partition(", or ")[0]
    assert command.endswith(f"--transform=center-crop --width={added} --height={added}" if added else "photos.zip'")
    words = shlex.split(command)[2:]
    assert words[:2] == ["--source=my photos", "--dest=data/my photos.zip"]
    built = CliRunner().invoke(dataset_tool.main, [*words, "--workers=1"])
    assert built.exit_code == 0, built.output
    arguments = ["--outdir=runs", "--device=cpu", "-n", "--data=data/my photos.zip", "--metrics=none", *options]
    result = CliRunner().invoke(train.main, arguments)
    assert result.exit_code == 0, result.output


def test_broken_images_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_images(Path("photos"), [(32, 32)] * 8)
    for number in (3, 5):
        (folder / f"{number:03d}.png").write_bytes(b"no image")
    message = train_error("--data=photos", "--cfg=tiny")
    assert "8 images, 2 cannot be read, the first is '003.png' (not a" in message
    assert message.endswith("python dataset_tool.py --source=photos --dest=data/photos.zip --skip-bad")


def test_a_built_dataset_of_wrong_size_should_be_rebuilt(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    options = ["--source=shapes", f"--dest={path}", "--max-images=3", "--resolution=64x64", "--workers=1"]
    assert CliRunner().invoke(dataset_tool.main, options).exit_code == 0
    for resume in ([], ["--resume=latest"]):
        assert train_error(f"--data={path}", "--cfg=tiny", *resume) == (
            f"Error: --data={path}: images of 64x64, and --cfg=tiny is for 32x32: rebuild the dataset with --width=32 "
            "--height=32, or give --cfg=auto"
        )
    assert train_error(f"--data={path}", "--cfg=tiny", "--g_dict=16,16", "--num_layers=1,1").startswith(
        "Error: --g_dict=16,16"
    )


def test_notes_on_the_data_are_printed(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data" / "mydata", [(32, 32)] * 3)
    labels = [[f"{number:03d}.png", number] for number in range(3)]
    (folder / "dataset.json").write_text(json.dumps({"Labels": labels}))
    arguments = ["--outdir=runs", "--device=cpu", "-n", f"--data={tmp_path / 'data'}", "--cfg=tiny", "--metrics=none"]
    result = CliRunner().invoke(train.main, arguments)
    assert result.exit_code == 0, result.output
    assert "Note: mydata/dataset.json is read: all images are in its folder" in result.stderr
    assert 'the key "Labels" is read as "labels"' in result.stderr
    arguments = [f"--network={folder.parent}", f"--data={folder.parent}", "--metrics=swd", "--device=cpu", "--no-cache"]
    result = CliRunner().invoke(calc_metrics.main, arguments)
    assert (
        result.stderr.count("Note: mydata/dataset.json is read: all images are in its folder\n") == 2
    )  # once per folder


# --- suggested sizes

COUNTS = st.dictionaries(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)), st.integers(1, 50), min_size=1, max_size=12
).map(Counter)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(COUNTS)
def test_the_suggested_side_is_reached_by_nine_of_ten_images(sizes: Counter[tuple[int, int]]) -> None:
    width, height = suggest_size(sizes)
    assert width == height in (8, 16, 32, 64, 128, 256, 512, 1024)
    sides = sorted(min(size) for size in sizes.elements())
    tenth = sides[len(sides) - -(-9 * len(sides) // 10)]  # nine of ten sides are at least as long
    assert width <= max(tenth, 8)
    assert width == 1024 or 2 * width > tenth


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(COUNTS, st.tuples(st.integers(1, 20), st.integers(1, 20)))
def test_candidate_sizes_are_multiples_of_the_base(sizes: Counter[tuple[int, int]], base: tuple[int, int]) -> None:
    candidates = candidate_sizes(sizes, base)
    assert len({*candidates}) == len(candidates) > 0
    assert all(width * base[1] == height * base[0] for width, height in candidates)


def test_sizes_and_build_commands_are_formatted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_sizes(Counter({(4000, 3000): 1, (120, 90): 2, (100, 100): 1})) == (
        "3 sizes, 100x100 to 4000x3000 pixels"
    )
    monkeypatch.chdir(tmp_path)
    assert build_command("photos/", "--skip-bad") == (
        "python dataset_tool.py --source=photos/ --dest=data/photos.zip --skip-bad"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "it's.zip").touch()
    command = build_command("data/it's.zip")
    assert shlex.split(command)[2:] == ["--source=data/it's.zip", "--dest=data/it's-built.zip"]
