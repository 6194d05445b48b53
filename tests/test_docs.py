"""Documentation: generated parts are up to date, commands and code run, links resolve."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
from click.testing import CliRunner, Result
from exploration_helpers import FAMILIES, MOVING, decode_video, save_untrained
from foreign_files import stylegan2_module, write
from PIL import Image

import calc_metrics
import dataset_tool
import generate
import legacy
import projector
import report
import style_mixing
import train
from dnnlib.cli import DefaultGroup
from metrics.registry import registered_metrics
from training.config import PRESETS
from training.networks.stylegan3 import StyleGAN3Config
from training.snapshots.snapshot import load_network

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {
    "train.py": train.main,
    "generate.py": generate.main,
    "style_mixing.py": style_mixing.main,
    "projector.py": projector.main,
    "calc_metrics.py": calc_metrics.main,
    "dataset_tool.py": dataset_tool.main,
    "legacy.py": legacy.main,
    "report.py": report.main,
}


def readme_commands(script: str) -> list[list[str]]:
    """Return the arguments of the complete commands in the README, i.e. those without `...`."""
    text = README.replace("\\\n", " ")
    lines = re.findall(rf"python {re.escape(script)} ([^`\n]*)", text)
    commands = [shlex.split(line, comments=True) for line in lines]
    return [command for command in commands if "..." not in command and command not in (["--help"], ["--cfg=help"])]


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up the module there
    spec.loader.exec_module(module)
    return module


def test_the_generated_reference_is_up_to_date() -> None:
    reference = load_script("make_reference")
    assert (ROOT / "docs" / "train-help.txt").read_text() == reference.train_help(), "run `make docs`"
    assert (ROOT / "docs" / "configuration.md").read_text() == reference.configuration(), "run `make docs`"


def test_the_transcript_of_a_messy_folder_is_up_to_date() -> None:
    transcript = load_script("make_transcript")
    assert transcript.PAGE.read_text() == transcript.page(), "run `make docs`"


def test_the_training_commands_of_the_readme_resolve(tmp_path: Path) -> None:
    sizes = {"stl10": 48, "celeba64": 64, "church128": 128}
    commands = readme_commands("train.py")
    assert len(commands) >= 5
    for command in commands:
        name = Path(next(item for item in command if item.startswith("--data=")).removeprefix("--data=")).stem
        data = tmp_path / f"{name}.zip"
        if not data.exists():
            side = sizes.get(name, 32)
            make = ["--source=shapes", f"--dest={data}", "--max-images=2", f"--width={side}", f"--height={side}"]
            assert CliRunner().invoke(dataset_tool.main, [*make, "--workers=1"]).exit_code == 0
        arguments = [f"--data={data}" if item.startswith("--data=") else item for item in command]
        result = CliRunner().invoke(train.main, [*arguments, "--device=cpu", "-n"])
        assert result.exit_code == 0, result.output
        (row,) = (line for line in README.splitlines() if f"python train.py {shlex.join(command)}" in line)
        for millions in re.findall(r"(\d+\.\d)M \|", row):
            assert f"{json.loads(result.stdout)['parameters']['G'] / 1e6:.1f}" == millions, row


def test_the_image_commands_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    of_labels = ("--class=", "--label=")  # the network of this test is unconditional
    commands = [c for c in readme_commands("generate.py") if not any(item.startswith(of_labels) for item in c)]
    assert len(commands) >= 2
    for command in commands:
        if command[0] == "play":  # runs until interrupted; tested in test_play.py
            continue
        arguments = [item.replace("SNAPSHOT", "docs/shapes.pkl") for item in command]
        result = CliRunner().invoke(generate.main, arguments)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "seed0035.png").exists()
    assert (tmp_path / "out" / "3-9.png").exists()


def test_the_commands_and_code_of_exploring_md_run(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands run in one folder and in order, because later ones read the files of earlier ones."""
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.chdir(tmp_path)
    save_untrained(tmp_path / "SNAPSHOT", shapes_zip, MOVING["styleformer-a"])
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    text = (ROOT / "docs" / "exploring.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^    python (generate.py|dataset_tool.py) (.*)", text, re.MULTILINE)
    assert len(commands) >= 2
    for script, command in commands:
        if command.startswith("play "):  # runs until interrupted; tested in test_play.py
            continue
        result = CliRunner().invoke(COMMANDS[script], shlex.split(command, comments=True))
        assert result.exit_code == 0, f"{command}\n{result.output}"
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, {})


@pytest.mark.parametrize("page", ["README.md", "docs/snapshots.md", "docs/migrating.md"])
def test_the_python_code_of_a_page_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    scope: dict[str, object] = {}
    exec(code, scope)
    assert tuple(scope["img"].shape) == (4, 3, 32, 32)  # type: ignore[attr-defined]


def test_the_info_commands_of_the_readme_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (command,) = [command for command in readme_commands("legacy.py") if command[0] == "info"]
    result = CliRunner().invoke(legacy.main, command)
    assert result.exit_code == 0, result.output
    assert "styleformer2, 184,806 parameters" in result.output


def test_the_commands_and_code_of_exchange_md_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ONNX graphs reproduce the image of generate.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    page = (ROOT / "docs" / "exchange.md").read_text()
    commands = re.findall(r"^    python legacy.py (.*)$", page, re.MULTILINE)
    assert len(commands) == 5
    write(tmp_path / "network-snapshot-025000.pkl", {"G_ema": stylegan2_module()})
    for command in commands:
        result = CliRunner().invoke(legacy.main, shlex.split(command))
        assert result.exit_code == 0, result.output
    scope: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, scope)
    assert tuple(scope["img"].shape) == (4, 3, 32, 32)
    arguments = ["--network=out/shapes.pkl", "--seeds=0", "--trunc=0.7", "--outdir=out"]
    assert CliRunner().invoke(generate.main, arguments).exit_code == 0
    with Image.open("out/seed0000.png") as image:
        assert np.abs(np.asarray(image).astype(int) - scope["pixels"]).max() <= 1


@pytest.mark.parametrize("script", COMMANDS)
def test_every_flag_in_the_documentation_exists(script: str) -> None:
    command = COMMANDS[script]
    commands = getattr(command, "commands", {})
    default = commands[command.default] if isinstance(command, DefaultGroup) else command
    lines = 0
    for page in [*PAGES, ROOT / "docs" / "colab.ipynb"]:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(rf"{re.escape(script)}\s+([^`\n]*)", text):
            one = commands.get(line.partition(" ")[0], default)
            known = {flag for option in one.params for flag in option.opts} | {"--help"}
            used = flags(line)
            assert used <= known, f"{page.name}: {script} {line}"
            lines += bool(used)
    assert lines, f"{script} is not documented"


def flags(line: str) -> set[str]:
    """Return the long flags of a command line."""
    return set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", line.split("#")[0]))


def test_every_flag_of_a_benchmark_exists() -> None:
    lines = 0
    for page in PAGES:
        for script, line in re.findall(r"python (benchmarks/\w+\.py) (.*)", page.read_text().replace("\\\n", " ")):
            source = (ROOT / script).read_text()
            if "from self_attention import" in source:  # shares its options with grid_attention.py
                source += (ROOT / "benchmarks" / "self_attention.py").read_text()
            assert {flag for flag in flags(line) if f'"{flag}"' not in source} == set(), f"{page.name}: {script} {line}"
            lines += 1
    assert lines > 5


def test_every_named_preset_metric_and_make_target_exists() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"--cfg=([\w-]+)", text)) <= {*PRESETS, "help"}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([\w-]+)", text)) <= set(targets)
    named = set(re.findall(r"`(.*?)`", (ROOT / "docs" / "metrics.md").read_text()))
    for spec in registered_metrics():
        assert named & {spec.pattern, spec.pattern.replace("<N>", "50k")}, spec.pattern


@pytest.mark.parametrize("name", COMMANDS)
def test_every_script_has_help(name: str) -> None:
    result = CliRunner().invoke(COMMANDS[name], ["--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_the_gallery_is_up_to_date_and_small() -> None:
    gallery = load_script("make_gallery")
    text = (ROOT / "docs" / "gallery.md").read_text()
    (network,) = set(re.findall(r"--network=([\w./-]+)", text))
    assert text == gallery.page(load_network(ROOT / network), network), "run docs/make_gallery.py"
    images = {path.name: path.stat().st_size for path in (ROOT / "docs" / "gallery").iterdir()}
    assert set(images) == set(re.findall(r"\(gallery/(.*?)\)", text))
    assert sum(images.values()) <= gallery.MAX_BYTES


def test_a_film_follows_the_motion_and_shows_a_row_over_time() -> None:
    """The image shifts by two pixels per frame, so the part that follows it is constant."""
    film = load_script("make_film")
    film.SIDE = 256  # type: ignore[attr-defined]
    wide = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    images = np.stack([wide[:, 16 - 2 * t : 80 - 2 * t] for t in range(9)])
    drawn = [film.parts(images, t, 2 * t / 64, 0.25, row=20) for t in range(9)]
    for t, (image, follower, over_time) in enumerate(drawn):
        assert image.shape == follower.shape == over_time.shape == (256, 256, 3)
        assert np.array_equal(follower, drawn[0][1])
        assert np.array_equal(image[2:70:4, 2::4], images[t, :17][:, :])
    expected = Image.fromarray(images[:, 20]).resize((256, 256), Image.Resampling.BICUBIC)
    assert np.array_equal(drawn[3][2][:, 20:-20], np.asarray(expected)[:, 20:-20])
    marks = [np.flatnonzero((over_time[:, 0] == film.CYAN).all(axis=1)).mean() for *_, over_time in drawn]
    np.testing.assert_allclose(marks, [256 * (t + 0.5) / 9 for t in range(9)], atol=1)


def test_a_film_compares_two_networks(shapes_zip: Path, tmp_path: Path) -> None:
    film = load_script("make_film")
    names = ("styleformer-f", "styleformer-a", "stylegan3-r")
    small = replace(cast(StyleGAN3Config, MOVING["stylegan3-r"]), side=16)
    configs = {**MOVING, "stylegan3-r": small, "plain": FAMILIES["styleformer"]}
    networks = {name: save_untrained(tmp_path / f"{name}.pkl", shapes_zip, configs[name]) for name in (*names, "plain")}

    def make(plain: str, alias_free: str, *options: str) -> Result:
        pair = [f"--plain={networks[plain]}", f"--alias-free={networks[alias_free]}", f"--output={tmp_path}/o/f.gif"]
        return CliRunner().invoke(film.main, [*pair, *options])

    for options, message in (
        (("plain", "styleformer-a"), "this styleformer network has no Fourier features at its input"),
        (("styleformer-f", "stylegan3-r"), "its images do not have the size 32x32 of --plain"),
        (("styleformer-f", "styleformer-a", "--row=32"), "--row=32: the images have the rows 0 to 31"),
        (("styleformer-f", "styleformer-a", "--translate=0.6"), "--translate=0.6: must be more than 0 and at most 0.5"),
    ):
        result = make(*options)
        assert (result.exit_code, message in result.output) == (2, True), result.output
    assert not (tmp_path / "o").exists()
    result = make("styleformer-f", "styleformer-a", "--frames=4", "--fps=10")
    assert result.exit_code == 0, result.output
    frames, fps = decode_video(tmp_path / "o" / "f.gif")
    assert (len(frames), fps) == (4, 10)
    assert np.abs(frames[0].astype(int) - frames[2]).max() > 50


def test_the_gallery_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rebuild one section in another folder; images outside the gallery are kept."""
    gallery = load_script("make_gallery")
    some = [
        entry for entry in gallery.entries(load_network(ROOT / "docs" / "shapes.pkl").G_ema) if "coarse" in entry.title
    ]
    monkeypatch.setattr(gallery, "entries", lambda G: some)
    monkeypatch.setattr(gallery, "take_screenshot", lambda browser, url, size, target: target.touch())
    monkeypatch.setattr(gallery, "find_browser", lambda: "chromium")
    arguments = [f"--network={ROOT / 'docs' / 'shapes.pkl'}", f"--outdir={tmp_path}"]
    images = tmp_path / "gallery"
    images.mkdir()
    (images / "mine.png").touch()
    result = CliRunner().invoke(gallery.main, arguments)
    assert (result.exit_code, "the folder exists without a gallery.md beside it" in result.stderr) == (2, True)
    (tmp_path / "gallery.md").touch()
    with monkeypatch.context() as broken:
        broken.setattr(gallery, "run_all", lambda *_: 1 / 0)
        assert isinstance(CliRunner().invoke(gallery.main, arguments).exception, ZeroDivisionError)
    assert (images / "mine.png").exists()
    result = CliRunner().invoke(gallery.main, arguments)
    assert result.exit_code == 0, result.output
    assert {path.name for path in images.iterdir()} == {"mix-coarse.png", *gallery.SCREENSHOTS}
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["samples.png"]
    assert "--styles=coarse" in (tmp_path / "gallery.md").read_text()


def test_the_commands_of_the_tutorial_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for i in range(4):
        Image.new("RGB", (100 + 10 * i, 90), (50 * i, 0, 0)).save(f"pictures/{i}.jpg")
    text = (ROOT / "docs" / "tutorial.md").read_text()
    commands = re.findall(r"^    python (\w+\.py) (.*)", text[: text.index("## 3.")], re.MULTILINE)
    assert [script for script, _ in commands] == ["dataset_tool.py", "dataset_tool.py", "train.py"]
    for script, arguments in commands:
        result = CliRunner().invoke(COMMANDS[script], shlex.split(arguments))
        assert result.exit_code == 0, f"{script} {arguments}\n{result.output}"
    assert '"images": 8' in result.output  # 4 images and their flips, which the floor counts


def test_every_named_extra_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set()
    for pattern in ("*.md", "*.yml", "*.py", "docs/*.md", "docs/*.ipynb", "*/*.py", "*/*/*.py"):
        for file in ROOT.glob(pattern):
            if ".venv" not in file.parts:
                named |= {
                    name for found in re.findall(r"\.\[([a-z,]+)\]", file.read_text()) for name in found.split(",")
                }
    assert {"metrics", "wandb"} <= named <= set(extras)


def test_links_between_the_pages_resolve() -> None:
    """Links point to existing files and headings."""
    for page in PAGES:
        for link in re.findall(r"\]\(([^):]+)\)", page.read_text()):
            file, _, heading = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), f"{page.name}: {link}"
            assert not heading or heading in headings(target), f"{page.name}: {link}"


def headings(page: Path) -> set[str]:
    """Return the link anchors of the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.*)", text, re.M)}


def test_the_index_lists_every_page() -> None:
    listed = set(re.findall(r"^\| \[.*?\]\((.*?)\)", (ROOT / "docs" / "README.md").read_text(), re.MULTILINE))
    pages = {path.name for pattern in ("*.md", "*.ipynb") for path in (ROOT / "docs").glob(pattern)}
    assert listed == pages - {"README.md"} | {"../CHANGELOG.md"}


def test_every_named_file_of_the_tree_exists() -> None:
    for page in PAGES:
        for path in re.findall(
            r"`((?:benchmarks|docs|exploration|metrics|tests|torch_utils|training)/[\w/.]+)`", page.read_text()
        ):
            assert (ROOT / path).exists() or path == "training/networks/film.py", f"{page.name}: {path}"


def test_the_shipped_snapshot_is_small_and_anonymous() -> None:
    path = ROOT / "docs" / "shapes.pkl"
    assert path.stat().st_size <= 3e6
    assert load_network(path).config.data.path == "shapes50k.zip"
