"""docs/migrating.md: complete lists of the other projects' flags and files, with statuses that match the code."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import click
import exploration_helpers
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from torch import nn

import calc_metrics
import dataset_tool
import dnnlib
import generate
import legacy
import projector
import style_mixing
import train
import training.dataset
import training.networks.generator
from metrics.detectors import DetectorSetup
from metrics.registry import resolve
from torch_utils import misc
from training.snapshots.snapshot import load_network

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "migrating.md").read_text()

# The flags of the public releases, by script.
THEIRS = {
    "train.py": """--outdir --gpus --snap --metrics --seed -n --dry-run --data --cond --subset --mirror --cfg --gamma
        --kimg --batch --aug --p --target --augpipe --resume --freezed --fp32 --nhwc --nobench --allow-tf32 --workers
        --g_dict --num_layers --depth --minimum_head --linformer""",
    "generate.py": "--network --seeds --trunc --class --noise-mode --projected-w --outdir",
    "style_mixing.py": "--network --rows --cols --styles --trunc --noise-mode --outdir",
    "projector.py": "--network --target --num-steps --seed --save-video --outdir",
    "calc_metrics.py": "--network --metrics --data --mirror --gpus --verbose",
    "dataset_tool.py": "--source --dest --max-images --resize-filter --transform --width --height",
    "legacy.py": "--source --dest --force-fp16",
}
FILES = {"training_options.json", "log.txt", "stats.jsonl", "metric-*.jsonl", "network-snapshot-*.pkl", "reals.png"}
FILES |= {"fakes*.png", "dataset.json"}
METRICS = ["fid50k_full", "kid50k_full", "pr50k3_full", "is50k", "ppl2_wend", "fid50k", "kid50k", "pr50k3"]
METRICS += ["ppl_zfull", "ppl_wfull", "ppl_zend", "ppl_wend"]

OURS: dict[str, click.Command] = {
    "train.py": train.main,
    "generate.py": generate.main.commands["images"],
    "style_mixing.py": style_mixing.main,
    "projector.py": projector.main,
    "calc_metrics.py": calc_metrics.main,
    "dataset_tool.py": dataset_tool.build,
    "legacy.py": legacy.main.commands["convert"],
}
SNAPSHOTS = {"train.py": "--resume", "legacy.py": "--source"}  # flag for the snapshot, if not --network


def section(title: str) -> str:
    """Return the text between a heading and the next heading."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table(title: str) -> dict[str, str]:
    """Return the status of each name in the tables of a section: same, changed or refused."""
    rows = re.findall(r"^\| (`.*?) \| (\w+) \|", section(title), re.MULTILINE)
    return {name: status for names, status in rows for name in re.findall(r"`(.*?)`", names)}


def flags_of(command: click.Command) -> set[str]:
    return {flag for option in command.params for flag in option.opts}


@pytest.mark.parametrize("script", THEIRS)
def test_every_foreign_flag_is_listed_with_its_actual_status(script: str) -> None:
    statuses = table(f"`{script}`")
    assert statuses.keys() == set(THEIRS[script].split())
    known = flags_of(OURS[script])
    for flag, status in statuses.items():
        assert status in ("same", "changed", "refused")
        assert (status != "refused") == (flag in known), f"{script} {flag}: {status}"


@pytest.mark.parametrize("script", [script for script in OURS if script != "dataset_tool.py"])
def test_rows_about_snapshots_match_the_flags(script: str) -> None:
    """test_foreign_tools.py tests that these flags accept URLs and foreign files."""
    flag = SNAPSHOTS.get(script, "--network")
    (option,) = (option for option in OURS[script].params if flag in option.opts)
    assert "URL" in option.make_metavar(click.Context(OURS[script]))
    (row,) = re.findall(rf"^\| `{flag}` \| \w+ \| (.*) \|$", section(f"`{script}`"), re.MULTILINE)
    assert "path or URL" in row
    assert "existing snapshots need no conversion" in row


def test_flags_shared_with_stylegan3_are_listed() -> None:
    commands = {"train.py": "train.py", "gen_images.py": "generate.py", "dataset_tool.py": "dataset_tool.py"}
    known = {there: flags_of(OURS[here]) for there, here in commands.items()}
    known["gen_video.py"] = flags_of(generate.main.commands["video"])
    rows = re.findall(r"^\| `(\w+\.py)\b(.*)\|$", section("StyleGAN3"), re.MULTILINE)
    assert {script for script, _ in rows} == set(known)
    for script, text in rows:
        same = text.replace("`--w-frames` is", "")
        for flag in re.findall(r"--[\w-]+", same):
            assert flag in known[script], f"{script} {flag}"


def test_every_foreign_file_is_listed() -> None:
    statuses = table("Files")
    assert statuses.keys() >= FILES
    assert {statuses[name] for name in FILES} == {"same", "changed"}


def test_foreign_metric_names_are_known() -> None:
    for name in METRICS:
        (found,) = resolve([name], DetectorSetup())
        assert found in (name, f"{name}_tvgg16")


def commands(script: str) -> list[list[str]]:
    lines = re.findall(rf"^    python {re.escape(script)} (.*)$", section("Commands that run unchanged"), re.MULTILINE)
    assert lines
    return [shlex.split(line) for line in lines]


def test_foreign_training_commands_run_unchanged(tmp_path: Path) -> None:
    sizes = {"ffhq256x256": 256, "celeba64": 64}
    for command in commands("train.py"):
        name = next(Path(item.partition("=")[2]).stem for item in command if item.startswith("--data="))
        data = tmp_path / f"{name}.zip"
        if not data.exists():
            side = sizes.get(name, 32)
            make = ["--source=shapes", f"--dest={data}", "--max-images=2", f"--width={side}", f"--height={side}"]
            assert CliRunner().invoke(dataset_tool.main, [*make, "--workers=1"]).exit_code == 0
        arguments = [f"--data={data}" if item.startswith("--data=") else item for item in command]
        result = CliRunner().invoke(train.main, [*arguments, "--device=cpu", "-n"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["parameters"]["D"] > 1_000_000


def test_foreign_image_commands_run_unchanged(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands share a folder; the last one reads the output of projector.py, run for a few steps without LPIPS."""
    monkeypatch.chdir(tmp_path)
    plain = exploration_helpers.make_snapshot(tmp_path / "plain.pkl", shapes_zip, "stylegan2")
    classes = exploration_helpers.make_snapshot(tmp_path / "classes.pkl", shapes_zip, "stylegan2", c_dim=2)
    Image.new("RGB", (32, 32), "red").save("target.png")
    further = {"projector.py": ["--target=target.png", "--num-steps=2", "--loss=pixels", "--save-video=0"]}
    for script in ("style_mixing.py", "projector.py", "generate.py"):
        for command in commands(script):
            network = classes if any("--class" in item for item in command) else plain
            main = generate.main if script == "generate.py" else OURS[script]
            result = CliRunner().invoke(main, [*command, f"--network={network}", *further.get(script, [])])
            assert result.exit_code == 0, result.output
    assert {"seed0849.png", "1500-293.png", "grid.png", "proj.png", "proj00.png"} <= {*os.listdir("out")}


@pytest.mark.parametrize("script", ["calc_metrics.py", "dataset_tool.py"])
def test_other_foreign_commands_run_unchanged(script: str) -> None:
    """The files are missing: the parser accepts the commands and the metrics are known."""
    for command in commands(script):
        context = OURS[script].make_context(script, list(command))
        resolve(context.params.get("names", ()), DetectorSetup())


@pytest.mark.parametrize("name", ["ffhq256", "ffhq512", "ffhq1024", "celebahq256", "lsundog256"])
def test_names_of_published_networks_are_explained(name: str, shapes32_zip: Path, tmp_path: Path) -> None:
    result = resume(name, shapes32_zip, tmp_path)
    data = re.fullmatch(r"([a-z]+?)(\d+)", name)
    assert data
    side = data[2]
    title = {"ffhq": "FFHQ", "celebahq": "CelebA-HQ", "lsundog": "LSUN Dog"}[data[1]]
    words = [f"--resume={name}: ", f"StyleGAN2-ADA published for {title} at {side}x{side}", "non-commercial licence"]
    assert result.exit_code == 2
    assert all(word in result.stderr for word in [*words, "give its path, or give its URL, as --resume=PATH|URL"])
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_noresume_is_explained(shapes32_zip: Path, tmp_path: Path) -> None:
    result = resume("noresume", shapes32_zip, tmp_path)
    assert (result.exit_code, "omit --resume for that" in result.stderr) == (2, True), result.output


def test_a_local_file_takes_precedence_over_a_published_name(
    shapes32_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ffhq256").write_text("no snapshot")
    assert "ffhq256: not a file of this project" in resume("ffhq256", shapes32_zip, tmp_path / "runs").stderr


def resume(name: str, data: Path, outdir: Path) -> Result:
    arguments = ["--cfg=tiny", "--metrics=none", "--device=cpu", f"--outdir={outdir}", f"--data={data}"]
    return CliRunner().invoke(train.main, [*arguments, f"--resume={name}"])


def test_the_python_names_on_the_page_exist() -> None:
    """Expressions in the first column exist unless their status is `refused`."""
    page = section("In Python")
    rows = re.findall(r"^\| `(.*?)`(.*?) \| (\w+) \|", page, re.MULTILINE)
    G = load_network(ROOT / "docs" / "shapes.pkl").G_ema
    dataset = training.dataset.ImageFolderDataset.__new__(training.dataset.ImageFolderDataset)
    roots = {"dnnlib": dnnlib, "legacy": legacy, "misc": misc, "training": training, "G": G, "ds": dataset}
    seen = set()
    for first, more, status in rows:
        assert status in ("same", "changed", "refused")
        for expression in [first, *re.findall(r"`(.*?)`", more)]:
            owner, *names = re.match(r"[\w.]+", expression)[0].split(".")  # type: ignore[index]
            value: object = roots[owner]
            if owner == "ds":
                continue  # set in __init__; tested in test_python_interface.py
            for name in names:
                value = getattr(value, name, None)
            keywords = re.findall(r"(\w+)=", expression)
            known = keywords_of(value) if keywords else set()
            assert (value is not None and set(keywords) <= known) == (status != "refused"), expression
            seen.add(expression)
    assert len(seen) > 20


def keywords_of(value: Any) -> set[str]:
    """Return the argument names of a function, a class, or the call of a network."""
    if isinstance(value, training.networks.generator.Generator):
        return keywords_of(value.forward) | keywords_of(value.synthesis)
    return set(inspect.signature(value.forward if isinstance(value, nn.Module) else value).parameters)
