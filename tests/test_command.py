"""The `styleformer` command and package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import PATIENCE, SMALL
from PIL import Image

import calc_metrics
import dataset_tool
import generate
import legacy
import styleformer
import train
from dnnlib.config import OPTIONS_FILE, ConfigError, UserError
from styleformer.__main__ import without_working_directory
from styleformer.command import COMMANDS, main
from styleformer.completion import joined

ROOT = Path(__file__).parent.parent
SNAPSHOT = ROOT / "docs" / "shapes.pkl"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
TOP_LEVEL = {name.partition(".")[0] for name in SETTINGS["packages"]}


def run(*arguments: object, env: dict[str, str] | None = None) -> str:
    result = CliRunner().invoke(main, [*map(str, arguments)], env=env)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


def start(*arguments: object, folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, with the packages of this checkout."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=PATIENCE)


def test_help_has_one_line_per_command() -> None:
    lines = run("--help").partition("Commands (COMMAND --help):\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == ["train", "generate", "metrics", "dataset", "snapshot", "report"]
    assert run("--version") == f"Styleformer, version {styleformer.__version__}\n"


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("train", "train [OPTIONS]"),
        ("generate", "generate images [OPTIONS]"),
        ("generate mix", "generate mix [OPTIONS]"),
        ("metrics", "metrics [OPTIONS]"),
        ("dataset", "dataset build [OPTIONS]"),
        ("dataset check", "dataset check [OPTIONS] PATH"),
        ("snapshot", "snapshot convert [OPTIONS]"),
        ("snapshot info", "snapshot info [OPTIONS] FILE"),
        ("report", "report [OPTIONS] RUN..."),
    ],
)
def test_usage_and_examples_name_the_command(command: str, usage: str) -> None:
    text = run(*command.split(), "--help")
    assert text.startswith(f"Usage: styleformer {usage}\n")
    assert not [script for script, _ in COMMANDS.values() if f"{script}.py" in text]
    assert "python " not in text


def test_a_script_keeps_its_own_name() -> None:
    assert "python train.py --outdir=runs" in CliRunner().invoke(train.main, ["--help"]).output


def test_errors_name_the_invoked_command(tmp_path: Path) -> None:
    def message(program: Any, *arguments: object) -> str:
        result = CliRunner().invoke(program, [*map(str, arguments)])
        assert result.exit_code == 2
        return result.output

    assert "made by dataset_tool.py" in message(train.main, f"--outdir={tmp_path}")
    assert "made by styleformer dataset" in message(main, "train", f"--outdir={tmp_path}")

    for side in (8, 16):
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
    source = [f"--source={tmp_path}", f"--dest={tmp_path / 'dataset_tool.py.zip'}", "--workers=1"]
    again = message(main, "dataset", *source).split("To continue:\n  ")[1]
    assert again.startswith(f"styleformer dataset {source[0]} {source[1]} ")
    (tmp_path / "train.py").touch()
    assert f"{tmp_path / 'train.py'}: not a file of this project" in message(
        main, "snapshot", "info", tmp_path / "train.py"
    )


@pytest.mark.parametrize(
    ("name", "hint"), [("trian", "; did you mean train?"), ("dataset_tool.py", "; did you mean dataset?"), ("x", "")]
)
def test_an_unknown_command_is_refused_with_the_nearest_one(name: str, hint: str) -> None:
    result = CliRunner().invoke(main, [name])
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, f"Error: no command {name!r}{hint}")


LAZY = """
import os, sys
from styleformer.command import main
import styleformer

def run(*arguments, **env):
    os.environ |= env
    try:
        main(arguments)
    except SystemExit as exit:
        assert exit.code == 0, arguments

run("--help")
run("train", "--help")
run("generate", "mix", "--help")
for words in ("", "tr", "train --cfg ti", "generate ", "generate --noi"):
    line = f"styleformer {words}"
    run(_STYLEFORMER_COMPLETE="zsh_complete", COMP_WORDS=line, COMP_CWORD=str(line.count(" ")))
print("imported:", *sorted({"torch", "numpy", "PIL"} & {*sys.modules}))
"""


def test_help_and_completion_import_no_torch(tmp_path: Path) -> None:
    found = start("-c", LAZY, folder=tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "imported:"


def complete(shell: str, *words: str) -> list[str]:
    """Return the lines that a shell receives to complete the last word."""
    env = {"_STYLEFORMER_COMPLETE": f"{shell}_complete", "COMP_WORDS": " ".join(["styleformer", *words])}
    env["COMP_CWORD"] = words[-1] if shell == "fish" else str(len(words))
    return run(env=env).rstrip("\n").splitlines()


def test_commands_are_completed_with_help_in_zsh_and_fish() -> None:
    assert complete("bash", "re") == ["plain,report"]
    assert complete("zsh", "re") == ["plain", "report", COMMANDS["report"][1]]
    assert complete("fish", "re") == [f"plain,report\t{COMMANDS['report'][1]}"]
    assert complete("bash", "") == [f"plain,{name}" for name in COMMANDS]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_options_and_values_are_completed(shell: str) -> None:
    def values(*words: str) -> list[str]:
        lines = complete(shell, *words)
        return lines[1::3] if shell == "zsh" else [line.split(",", 1)[1].partition("\t")[0] for line in lines]

    assert values("train", "--grad") == ["--grad-checkpoint"]
    assert values("train", "--grad_") == ["--grad_checkpoint"]
    prefix = "--cfg=" if shell == "zsh" else ""  # the completion script of fish adds the prefix
    assert values("train", "--cfg", "ti") == ["tiny"]
    assert values("train", "--cfg=ti") == [f"{prefix}tiny"]
    assert values("generate", "m") == ["mix"]
    assert values("generate", "--noise-mode", "c") == ["const"]
    assert values("dataset", "check", "--she") == ["--sheet"]


def test_paths_are_left_to_the_shell() -> None:
    paths = {
        "train --data=da": "file,da",
        "train --outdir ru": "dir,ru",
        "train --resume=ru": "file,ru",
        "generate --network=ne": "file,ne",
        "dataset --source ph": "file,ph",
        "dataset check da": "file,da",
    }
    assert {line: complete("bash", *line.split())[0] for line in paths} == paths
    assert complete("bash", "train", "--kimg", "1") == []


def test_words_that_bash_splits_at_an_equals_sign_are_joined() -> None:
    assert joined(["train", "--data", "=", "x", "--set", "a.b", "=", "1"]) == ["train", "--data=x", "--set", "a.b=1"]
    assert joined(["train", "--cfg", "="]) == ["train", "--cfg="]
    assert joined(["=", "x"]) == ["=x"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(tmp_path: Path) -> None:
    program = tmp_path / "styleformer"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m styleformer "$@"\n')
    program.chmod(0o755)
    script = """
        eval "$(_STYLEFORMER_COMPLETE=bash_source styleformer)"
        COMP_WORDS=(styleformer generate --noise-mode = c) COMP_CWORD=4
        complete -p styleformer
        _styleformer_completion styleformer
        echo "${COMPREPLY[@]}"
    """
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(["bash", "--norc", "-c", script], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["complete -o nosort -F _styleformer_completion styleformer", "const"]


def test_the_package_lists_its_names_and_refuses_others() -> None:
    assert {"Dataset", "compute_metric", "generate", "load_network", "train"} <= {*dir(styleformer)}
    with pytest.raises(AttributeError, match="no attribute 'sample'; there are Dataset, "):
        styleformer.sample  # noqa: B018
    for name in set(styleformer.__all__) - {"__version__"}:
        assert getattr(styleformer, name).__doc__


def test_generate_returns_the_images_of_the_command(tmp_path: Path) -> None:
    options = [f"--network={SNAPSHOT}", "--seeds=3,5,8", "--trunc=0.7", f"--outdir={tmp_path}", "--device=cpu"]
    assert CliRunner().invoke(generate.main, options).exit_code == 0
    snapshot = styleformer.load_network(SNAPSHOT)
    images = styleformer.generate(snapshot, (3, 5, 8), truncation_psi=0.7, batch=2)
    assert (images.dtype, images.shape) == (torch.uint8, (3, *snapshot.G_ema.img_shape))
    for seed, image in zip((3, 5, 8), images, strict=True):
        written = np.asarray(Image.open(tmp_path / f"seed{seed:04d}.png"))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), written)
    again = styleformer.generate(str(SNAPSHOT), [5], truncation_psi=0.7, device="cpu")
    assert torch.equal(again[0], images[1])
    assert legacy.load_network(SNAPSHOT).G_ema.state_dict().keys() == snapshot.G_ema.state_dict().keys()


def test_generate_refuses_invalid_arguments() -> None:
    snapshot = styleformer.load_network(SNAPSHOT)
    with pytest.raises(UserError, match=r"^seeds=\(\): specify at least one seed"):
        styleformer.generate(snapshot, [])
    with pytest.raises(UserError, match=r"^seeds=\(-1,\): specify at least one seed, none below 0"):
        styleformer.generate(snapshot, [-1])
    with pytest.raises(UserError, match=r"^batch=0: must be at least 1"):
        styleformer.generate(snapshot, [0], batch=0)
    with pytest.raises(UserError, match=r"^class_index=1: this network was trained without labels"):
        styleformer.generate(snapshot, [0], class_index=1)
    with pytest.raises(UserError, match=r"^device=cpu: the network is already loaded"):
        styleformer.generate(snapshot, [0], device="cpu")


def test_compute_metric_returns_the_record_of_the_command(shapes32_zip: Path, tmp_path: Path) -> None:
    network = shutil.copy(SNAPSHOT, tmp_path)
    options = [f"--network={network}", f"--data={shapes32_zip}", "--metrics=swd64", "--device=cpu", "--no-cache"]
    (tmp_path / OPTIONS_FILE).touch()
    result = CliRunner().invoke(calc_metrics.main, options)
    assert result.exit_code == 0, result.output
    printed = json.loads(next(line for line in result.output.splitlines() if line.startswith("{")))
    lines = (tmp_path / "metric-swd64.jsonl").read_text()
    record = styleformer.compute_metric(network, "swd64", shapes32_zip, device="cpu", use_cache=False)
    varying = {"seconds", "timestamp"}
    assert {key: value for key, value in record.items() if key not in varying} == {
        key: value for key, value in printed.items() if key not in varying
    }
    assert record["results"]["swd64"] > 0
    assert (tmp_path / "metric-swd64.jsonl").read_text() == lines  # nothing is written
    with pytest.raises(UserError, match="unknown metric 'fud'"):
        styleformer.compute_metric(network, "fud")
    with pytest.raises(UserError, match="specify the real images with `data`"):
        styleformer.compute_metric(shapes32_zip, "swd64")


def test_train_resolves_the_configuration_of_the_command(
    shapes_zip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--outdir={tmp_path}", f"--data={shapes_zip}", "--device=cpu", "--kimg=1", "--metrics=none", "-n"]
    command = CliRunner().invoke(main, ["train", "--cfg=tiny", "--g_dict=32,16", "--num_layers=1,1", *options])
    assert command.exit_code == 0, command.output
    settings = {"run.device": "cpu", "run.total_kimg": 1, "run.metrics": (), "generator.widths": (32, 16)}
    settings["generator.layers"] = [1, 1]
    styleformer.train(tmp_path, shapes_zip, preset="tiny", settings=settings, dry_run=True)
    assert json.loads(capsys.readouterr().out) == json.loads(command.stdout)
    with pytest.raises(ConfigError, match=r"^run.kimg='1': no such field"):
        styleformer.train(tmp_path, shapes_zip, settings={"run.kimg": 1})
    with pytest.raises(UserError, match=r"^run.metrics=None: specify 'none' or 'auto'"):
        styleformer.train(tmp_path, shapes_zip, settings={"run.metrics": None})
    assert [*tmp_path.iterdir()] == []


def test_datasets_are_read_by_item(shapes_zip: Path) -> None:
    dataset = styleformer.Dataset(shapes_zip, use_labels=True)
    image, label = dataset[3]
    assert (image.shape, image.dtype, label.dtype) == ((3, 16, 16), np.uint8, np.float32)
    assert label.shape == (dataset.label_dim,)


def test_the_python_code_of_the_page_runs(shapes32_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shapes.zip").symlink_to(shapes32_zip)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    scope: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    for code in blocks:
        if "styleformer.train(" not in code:  # covered by tests/test_training.py
            exec(code, scope)
    assert len(blocks) == 3
    assert scope["images"].shape == (4, 3, 32, 32)
    assert scope["img"].shape == (4, 3, 32, 32)
    assert scope["record"]["results"]["swd64"] > 0
    assert scope["image"].shape == (3, 32, 32)


def test_files_in_the_working_directory_shadow_no_module(tmp_path: Path) -> None:
    """Empty folders, such as from `--outdir=training`, and scripts; spawned processes convert the images."""
    for name in TOP_LEVEL - {"styleformer"}:
        (tmp_path / name).mkdir()
    data = "--source=shapes", "--dest=data.zip", "--max-images=8", "--workers=2"
    imported = start("-c", "import styleformer; styleformer.train, styleformer.Dataset", folder=tmp_path)
    assert imported.returncode == 0, imported.stderr
    for name in SETTINGS["py-modules"]:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    (tmp_path / "dnnlib" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    built = start("-m", "styleformer", "dataset", *data, folder=tmp_path)
    assert built.returncode == 0, built.stderr
    assert dataset_tool.read_dataset_json(dataset_tool.open_store(tmp_path / "data.zip")).meta["num_images"] == 8


def test_a_working_directory_with_the_package_stays_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert without_working_directory([str(tmp_path), "/elsewhere"]) == ["/elsewhere"]
    assert without_working_directory(["", "/elsewhere"]) == ["/elsewhere"]
    assert without_working_directory(["/elsewhere", str(tmp_path)]) == ["/elsewhere", str(tmp_path)]
    monkeypatch.chdir(ROOT)
    assert without_working_directory([str(ROOT), "/elsewhere"]) == [str(ROOT), "/elsewhere"]


@pytest.mark.slow
def test_torchrun_starts_the_module(shapes_zip: Path, tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "styleformer")
    options = [f"--data={shapes_zip}", "--outdir=training", "--device=cpu", "-n"]
    (tmp_path / "training").mkdir()
    found = start(*torchrun, "train", *SMALL, *options, folder=tmp_path)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["options"]["run"]["num_gpus"] == 1


def test_the_project_file_lists_every_package_and_script() -> None:
    ignored = {"tests", "benchmarks", "docs", "build", ".venv"}
    inits = (path.relative_to(ROOT).parent for path in ROOT.rglob("__init__.py"))
    packages = {".".join(path.parts) for path in inits if path.parts[0] not in ignored}
    assert {*SETTINGS["packages"]} == packages
    assert {*SETTINGS["py-modules"]} == {path.stem for path in ROOT.glob("*.py")}
    assert {script for script, _ in COMMANDS.values()} <= {*SETTINGS["py-modules"]}
    for folder in {path.parent for name in TOP_LEVEL for path in (ROOT / name).rglob("*.py")}:
        assert (folder / "__init__.py").exists(), (
            f"{folder} is a namespace package, and a regular package of that name would shadow it"
        )


def test_the_project_file_lists_every_data_file() -> None:
    data = SETTINGS["package-data"]
    for name in SETTINGS["packages"]:
        for path in (ROOT / name.replace(".", "/")).iterdir():
            if path.is_file() and path.suffix not in {".py", ".pyc"}:
                assert any(path.match(pattern) for pattern in data.get(name, []) + data["*"]), path
    assert all((ROOT / name / "py.typed").exists() for name in TOP_LEVEL)


@pytest.mark.slow
def test_an_installation_works_outside_of_the_checkout(tmp_path: Path) -> None:
    """Install the wheel in a new environment that takes its dependencies from the current environment."""
    pytest.importorskip("setuptools", "77")
    source, folder, env = tmp_path / "source", tmp_path / "work", tmp_path / "env"
    ignored = shutil.ignore_patterns(".*", "tests", "benchmarks", "__pycache__", "images", "gallery", "out", "build")
    shutil.copytree(ROOT, source, ignore=ignored)
    folder.mkdir()
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {*archive.namelist()}
    needed = [path for name in TOP_LEVEL for path in (ROOT / name).rglob("*") if path.is_file()]
    assert {str(path.relative_to(ROOT)) for path in needed if path.suffix != ".pyc"} <= names

    venv.create(env, with_pip=False)
    (site,) = env.glob("lib/python*/site-packages")
    install = [*pip, "--python", str(env / "bin" / "python"), "install", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (site / "others.pth").write_text(str(Path(torch.__file__).parent.parent))
    (folder / "training").mkdir()
    for words in (
        "--version",
        "dataset --source=shapes --dest=data.zip --max-images=64 --width=16 --height=16",
        f"train {' '.join(SMALL)} --data=data.zip --outdir=training --kimg=0.1 --metrics=none --device=cpu --gpus=2",
        "snapshot info training/00000-data-tiny-gpus2-batch16",
    ):
        command = [str(env / "bin" / "styleformer"), *words.split()]
        outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(command, cwd=folder, env=outside, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
