"""docs/migrating.md is complete and true: every flag of the other projects, with what really became of it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from snapshot_helpers import make_snapshot

import calc_metrics
import dataset_tool
import generate
import legacy
import train
from metrics.detectors import DetectorSetup
from metrics.registry import resolve

PAGE = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text()

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
    "style_mixing.py": generate.main.commands["mix"],
    "projector.py": generate.main.commands["project"],
    "calc_metrics.py": calc_metrics.main,
    "dataset_tool.py": dataset_tool.build,
    "legacy.py": legacy.main.commands["convert"],
}
SNAPSHOTS = {"train.py": "--resume", "legacy.py": "--source"}  # the flags that name one, elsewhere --network


def section(title: str) -> str:
    """The text under a heading, up to the next."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table(title: str) -> dict[str, str]:
    """What the tables of a section say of each name: same, changed or refused."""
    rows = re.findall(r"^\| (`.*?) \| (\w+) \|", section(title), re.MULTILINE)
    return {name: status for names, status in rows for name in re.findall(r"`(.*?)`", names)}


def flags_of(command: click.Command) -> set[str]:
    return {flag for option in command.params for flag in option.opts}


@pytest.mark.parametrize("script", THEIRS)
def test_every_flag_of_theirs_is_there_with_what_is_true(script: str) -> None:
    statuses = table(f"`{script}`")
    assert statuses.keys() == set(THEIRS[script].split())
    known = flags_of(OURS[script])
    for flag, status in statuses.items():
        assert status in ("same", "changed", "refused")
        assert (status != "refused") == (flag in known), f"{script} {flag}: {status}"


@pytest.mark.parametrize("script", [script for script in OURS if script != "dataset_tool.py"])
def test_rows_about_snapshots_say_what_the_flags_take(script: str) -> None:
    """That they take addresses and foreign files is tested in test_foreign_tools.py."""
    flag = SNAPSHOTS.get(script, "--network")
    (option,) = (option for option in OURS[script].params if flag in option.opts)
    assert "URL" in option.make_metavar(click.Context(OURS[script]))
    (row,) = re.findall(rf"^\| `{flag}` \| \w+ \| (.*) \|$", section(f"`{script}`"), re.MULTILINE)
    assert "path or URL" in row
    assert "theirs are read as they are" in row


def test_what_is_the_same_as_in_stylegan3_is_there() -> None:
    commands = {"train.py": "train.py", "gen_images.py": "generate.py", "dataset_tool.py": "dataset_tool.py"}
    known = {there: flags_of(OURS[here]) for there, here in commands.items()}
    known["gen_video.py"] = flags_of(generate.main.commands["video"])
    rows = re.findall(r"^\| `(\w+\.py)\b(.*)\|$", section("StyleGAN3"), re.MULTILINE)
    assert {script for script, _ in rows} == set(known)
    for script, text in rows:
        same = re.sub(r"`--translate` and .*? are not|`--w-frames` is", "", text)
        for flag in re.findall(r"--[\w-]+", same):
            assert flag in known[script], f"{script} {flag}"
    assert not {"--translate", "--rotate"} & known["gen_images.py"]


def test_every_file_of_theirs_is_there() -> None:
    statuses = table("Files")
    assert statuses.keys() >= FILES
    assert {statuses[name] for name in FILES} == {"same", "changed"}


def test_their_names_of_metrics_are_known() -> None:
    for name in METRICS:
        (found,) = resolve([name], DetectorSetup())
        assert found in (name, f"{name}_tvgg16")


def commands(script: str) -> list[list[str]]:
    lines = re.findall(
        rf"^    python {re.escape(script)} (.*)$", section("Commands that run as they are"), re.MULTILINE
    )
    assert lines
    return [shlex.split(line) for line in lines]


def test_their_trainings_run_as_they_are(tmp_path: Path) -> None:
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


def test_their_images_are_made_as_they_are(tmp_path: Path) -> None:
    make_snapshot(tmp_path / "plain.pkl")
    make_snapshot(tmp_path / "classes.pkl", c_dim=2)
    for number, command in enumerate(commands("generate.py")):
        name = "classes" if any("--class" in item for item in command) else "plain"
        paths = [f"--network={tmp_path / name}.pkl", f"--outdir={tmp_path / str(number)}"]
        result = CliRunner().invoke(generate.main, [*command, *paths])
        assert result.exit_code == 0, result.output
    assert (tmp_path / "0" / "seed0849.png").exists()


@pytest.mark.parametrize("script", ["calc_metrics.py", "dataset_tool.py"])
def test_their_other_commands_are_understood(script: str) -> None:
    """Without the files that they are about: the parser takes them, and the metrics are known."""
    for command in commands(script):
        context = OURS[script].make_context(script, list(command))
        resolve(context.params.get("names", ()), DetectorSetup())


def test_refused_names_of_networks_are_refused(shapes32_zip: Path, tmp_path: Path) -> None:
    arguments = ["--cfg=tiny", "--metrics=none", "--device=cpu", f"--outdir={tmp_path}", f"--data={shapes32_zip}"]
    result = CliRunner().invoke(train.main, [*arguments, "--resume=ffhq256"])
    assert (result.exit_code, "--resume=ffhq256: neither" in result.output) == (2, True), result.output
    assert not list(tmp_path.iterdir())
