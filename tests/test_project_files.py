"""Files around the code: version, issue forms, workflow, Dockerfile, contents of the source archive."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PATIENCE

import dnnlib

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Instructions of the reference of Dockerfile, without the deprecated MAINTAINER.
INSTRUCTIONS = {
    "ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "ONBUILD", "RUN",
    "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR",
}  # fmt: skip


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert PROJECT["dynamic"] == ["version"]
    assert released[0] == f"{dnnlib.__version__} ({citation['date-released']})"
    assert citation["version"] == dnnlib.__version__
    assert headings.index(released[0]) == headings.count("Unreleased") <= 1  # the section for later changes is first


def test_the_release_begins_with_a_short_summary() -> None:
    release = (ROOT / "CHANGELOG.md").read_text().split(f"\n## {dnnlib.__version__} ")[1].split("\n## ")[0]
    summary, *sections = release.split("\n### ")
    assert [section.partition("\n")[0] for section in sections] == ["Incompatible changes", "Added", "Fixed"]
    assert 0 < len(summary.strip().splitlines()) - 2 <= 10  # without date and empty line
    entries = re.findall(r"^- (.*(?:\n  .*)*)", release, re.MULTILINE)
    assert len(entries) == len({*entries}) > 100


def load_form(name: str) -> dict[str, Any]:
    form: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text())
    return form


@pytest.mark.parametrize("name", ["bug_report.yml", "feature_request.yml"])
def test_issue_forms_have_the_keys_that_github_requires(name: str) -> None:
    form = load_form(name)
    assert {"name", "description", "body"} <= {*form} <= {"name", "description", "title", "labels", "body"}
    fields = [item for item in form["body"] if item["type"] != "markdown"]
    assert len({item["id"] for item in fields}) == len({item["attributes"]["label"] for item in fields}) == len(fields)
    assert any(item.get("validations", {}).get("required") for item in fields)
    for item in form["body"]:
        assert item["type"] in {"checkboxes", "dropdown", "input", "markdown", "textarea"}
        assert {*item} <= {"type", "id", "attributes", "validations"}
        assert {*item["attributes"]} <= {"label", "description", "placeholder", "value", "render", "options"}
        assert item["type"] != "markdown" or item["attributes"]["value"]


def test_forms_and_templates_name_existing_files() -> None:
    assert {*load_form("config.yml")} == {"blank_issues_enabled"}
    named = set()
    for file in (ROOT / ".github").rglob("*.*"):
        named |= set(re.findall(r"[\w./-]+\.md\b|\.ci/run", file.read_text()))
    assert {"SECURITY.md", "CONTRIBUTING.md", ".ci/run"} <= named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_workflow_runs_the_checks_of_every_change() -> None:
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert commands == ["make check", "make test"]
    listed = {item.rpartition(" :: ")[2] for item in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", item)}
    assert {*job["strategy"]["matrix"]["python"]} == listed


def instructions(text: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile with their arguments. Raises ValueError if a continuation is open."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\s*\n", " ", "\n".join(lines))
    if joined.endswith("\\"):
        raise ValueError("the last line is continued")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


DOCKERFILE = instructions((ROOT / "Dockerfile").read_text())


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in DOCKERFILE if instruction == name]


def is_ignored(path: Path) -> bool:
    """Return whether .dockerignore excludes a path of the project: the last pattern that matches it decides."""
    ignored = False
    names = [str(path), *map(str, path.parents)]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            anywhere = pattern.removeprefix("**/")
            tried = (name if anywhere == pattern else Path(name).name for name in names)
            if any(fnmatch.fnmatchcase(name, anywhere) and name.count("/") <= pattern.count("/") for name in tried):
                ignored = not line.startswith("!")
    return ignored


def test_the_instructions_of_the_dockerfile_are_valid() -> None:
    assert instructions("# a\nRUN a \\\n# b\n  && b\nUSER c") == [("RUN", "a    && b"), ("USER", "c")]
    with pytest.raises(ValueError, match="continued"):
        instructions("RUN a \\")
    assert [name for name, rest in DOCKERFILE if name not in INSTRUCTIONS or not rest] == []
    assert DOCKERFILE[0][0] == "FROM"
    for name in ("CMD", "ENTRYPOINT"):
        (words,) = arguments(name)
        assert all(isinstance(word, str) for word in json.loads(words))
    for line in arguments("ENV") + arguments("ARG"):
        assert all(re.fullmatch(r"[A-Z_]+=\S+", word) for word in shlex.split(line)), line
    for command in arguments("RUN"):
        script = re.sub(r"^(--\w+=\S+ +)*", "", command)
        checked = subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr


def test_the_base_image_has_the_cuda_version_of_torch() -> None:
    (image,) = arguments("FROM")
    version = re.fullmatch(r"nvidia/cuda:(\d+)\.\d+\.\d+-devel-ubuntu24\.04", image)
    assert version
    if torch.version.cuda:
        assert version[1] == torch.version.cuda.split(".")[0]


def test_the_image_runs_as_a_user_who_can_write_the_caches() -> None:
    names = [name for name, _ in DOCKERFILE]
    (user,) = arguments("USER")
    assert user not in {"root", "0"}
    assert names.index("USER") > len(names) - 1 - names[::-1].index("RUN")
    variables = dict(word.split("=", 1) for line in arguments("ENV") for word in shlex.split(line))
    caches = {"HOME", "DNNLIB_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
    assert {variables[name].split("/")[1] for name in caches} == {"cache"}
    assert "mkdir --mode=1777 /cache " in arguments("RUN")[-1]
    (extras,) = (line.removeprefix("EXTRAS=").split(",") for line in arguments("ARG"))
    assert {*extras} == {*PROJECT["optional-dependencies"]} - {"dev", "docs", "notebook"}


def test_the_image_contains_the_packages_and_nothing_else() -> None:
    (copied,) = arguments("COPY")
    assert copied == ". ."
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("needs a git checkout")
    files = [Path(name) for name in tracked.stdout.split("\0") if name]
    sent = {path for path in files if not is_ignored(path)}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    tops = {name.partition(".")[0] for name in settings["packages"]}
    modules = {Path(f"{name}.py") for name in settings["py-modules"]}
    others = {Path(name) for name in ("pyproject.toml", "LICENSE", "README.md", "docs/shapes.pkl")}
    assert sent == {path for path in files if path.parts[0] in tops} | modules | others
    for name in (".git/config", ".venv/bin/python", "runs/00000/log.txt", "data/a.zip", "dnnlib/__pycache__/a.pyc"):
        assert is_ignored(Path(name)), name


@pytest.mark.slow
def test_the_archives_contain_the_documentation(tmp_path: Path) -> None:
    """Build sdist and wheel from a copy of the tracked files, the wheel from the sdist."""
    pytest.importorskip("build")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        target = tmp_path / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    command = [sys.executable, "-m", "build", "--no-isolation", f"--outdir={tmp_path}", str(tmp_path / "source")]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    assert wheel.name == f"styleformer-{dnnlib.__version__}-py3-none-any.whl"
    with tarfile.open(sdist) as archive:
        packed = {Path(name).relative_to(f"styleformer-{dnnlib.__version__}").as_posix() for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files", "*.md", "examples"], cwd=ROOT, capture_output=True, text=True).stdout
    expected = {
        name for name in listed.split() if not name.startswith((".github", "tests", "benchmarks", "docs/theme"))
    }
    assert expected | {"Dockerfile", ".dockerignore", "CITATION.cff", "LICENSE"} <= packed
    assert not [name for name in packed if name.startswith(("tests/", ".github"))]
    with zipfile.ZipFile(wheel) as installed:
        assert {"train.py", "torch_utils/ops/bias_act.cu"} <= {*installed.namelist()}
