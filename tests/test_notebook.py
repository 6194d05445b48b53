"""docs/colab.ipynb: its stored outputs, docs/make_notebook.py, and an execution with small settings."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SMALL
from PIL import Image, ImageSequence

from dnnlib.config import UserError
from dnnlib.images import open_image

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "colab.ipynb"
TEXT, IMAGE, PAGE = "stdout", "image/png", "text/html"
OUTPUTS = {
    "machine": [TEXT],
    "dataset": [TEXT],
    "sheet": [TEXT, IMAGE],
    "train": [TEXT],
    "progress": [IMAGE],
    "images": [TEXT, IMAGE],
    "python": [TEXT],
    "mixing": [TEXT, IMAGE],
    "attention": [TEXT, IMAGE],
    "video": [TEXT, PAGE],
    "metric": [TEXT],
    "report": [TEXT, PAGE],
}
# Settings of the cell `settings` for a run of seconds.
SMALLER = [*SMALL, "--g_dict=32,16,16", "--num_layers=1,1,1", "--kimg=0.032", "--tick=0.016", "--snap=1"]


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Return docs/make_notebook.py as a module."""
    spec = importlib.util.spec_from_file_location("make_notebook", ROOT / "docs" / "make_notebook.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(notebook: Any) -> dict[str, Any]:
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def kinds(cell: Any) -> list[str]:
    """Return the stream name or the richest MIME type of each output."""
    return [
        output.name
        if output.output_type == "stream"
        else next(kind for kind in (IMAGE, PAGE, "error") if kind in output.get("data", {"error": ""}))
        for output in cell.outputs
    ]


def html_of(notebook: Any, name: str) -> str:
    (text,) = (output.data[PAGE] for output in code_cells(notebook)[name].outputs if PAGE in output.get("data", {}))
    return text


def texts_of(notebook: Any) -> list[str]:
    """Return all texts of the outputs, without images."""
    outputs = [output for cell in code_cells(notebook).values() for output in cell.outputs]
    texts = [output.get("text", "") for output in outputs]
    texts += [text for output in outputs for kind, text in output.get("data", {}).items() if "text/" in kind]
    return [re.sub(r"base64,[\w+/=]+", "", text) for text in texts]


def test_the_notebook_is_valid_and_small(notebook: Any) -> None:
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size <= 2_000_000
    ids = [cell.id for cell in notebook.cells]
    assert len({*ids}) == len(ids)
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert max(len(line) for cell in notebook.cells for line in cell.source.splitlines()) <= 120


def test_the_outputs_belong_to_the_code(notebook: Any) -> None:
    cells = code_cells(notebook).values()
    expected = hashlib.sha256("\0".join(cell.source for cell in cells).encode()).hexdigest()
    assert notebook.metadata["source_sha256"] == expected, "run docs/make_notebook.py"
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]


def test_the_cells_have_their_outputs(notebook: Any) -> None:
    assert {name: kinds(cell) for name, cell in code_cells(notebook).items() if cell.outputs} == OUTPUTS


def test_the_outputs_name_no_local_paths(notebook: Any) -> None:
    texts = texts_of(notebook)
    assert any("out/notebook/runs/00000-" in text for text in texts)
    for text in texts:
        assert re.findall(r"(?<![\w.:/])/(?:root|work|home|tmp|usr|mnt|Users)/.{0,40}", text) == []
        assert re.findall(r"[\r\x1b]|(?i:\bwarning:)|Traceback|\d+ of \d+\n", text) == []


def test_the_stored_images_show_something(notebook: Any) -> None:
    cells = code_cells(notebook).values()
    images = [output.data[IMAGE] for cell in cells for output in cell.outputs if IMAGE in output.get("data", {})]
    assert len(images) == 5
    for data in images:
        with open_image(base64.b64decode(data)) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert min(pixels.shape[:2]) >= 200
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500


def test_the_stored_video_moves(notebook: Any) -> None:
    (data,) = re.findall(r"data:image/gif;base64,([\w+/=]+)", html_of(notebook, "video"))
    with Image.open(io.BytesIO(base64.b64decode(data))) as video:
        frames = [np.asarray(frame.convert("RGB"), dtype=float) for frame in ImageSequence.Iterator(video)]
    assert len(frames) == 32
    assert np.abs(frames[0] - frames[8]).mean() > 5  # keyframes of two seeds


def test_the_stored_training_improves_the_metric(notebook: Any) -> None:
    (log,) = (output.text for output in code_cells(notebook)["train"].outputs)
    values = [float(value) for value in re.findall(r"^kimg \d+: swd500 ([\d.]+)", log, re.MULTILINE)]
    assert len(values) == 4
    assert values[-1] <= 0.6 * values[0]
    assert log.splitlines()[-1].startswith("Done: ")


class Elements(HTMLParser):
    """Parser that lists the elements of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_report_is_in_a_sandboxed_frame(notebook: Any) -> None:
    """The styles and scripts of the report do not affect the page of the notebook."""
    elements = Elements(html_of(notebook, "report")).found
    assert [tag for tag, _ in elements] == ["div", "iframe"]
    frame = elements[1][1]
    assert frame["sandbox"] == "allow-scripts"
    page = frame["srcdoc"] or ""
    assert page.startswith("<!DOCTYPE html>")
    assert page.rstrip().endswith("</html>")
    tags = [tag for tag, _ in Elements(page).found]
    assert {"style", "script", "svg", "img"} <= {*tags}


def test_the_contents_link_to_the_headings(notebook: Any) -> None:
    """Jupyter links to headings, with hyphens for spaces; Colab and VS Code need the anchors."""
    title, *others = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    links = re.findall(r"^\d+\. \[.*?\]\(#(.*?)\)", title, re.MULTILINE)
    sections = "\n".join(others)
    assert links == [heading.replace(" ", "-") for heading in re.findall(r"^## (.*)", sections, re.MULTILINE)]
    assert links == re.findall(r'<a id="(.*?)" name="\1"></a>', sections)
    for target in re.findall(r"\]\(([\w.]+\.md)\)", sections):
        assert (ROOT / "docs" / target).exists()


@pytest.fixture
def find_project(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs the cell `project` with SOURCE in an empty folder and returns the new folder."""
    monkeypatch.chdir(tmp_path)

    def run(source: object) -> Path:
        exec(code_cells(notebook)["project"].source, {"SOURCE": str(source)})
        return Path.cwd()

    return run


def make_project(folder: Path) -> Path:
    (folder / "docs").mkdir(parents=True)
    (folder / "docs" / "shapes.pkl").touch()
    return folder


def test_an_empty_source_is_reported(find_project: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^SOURCE is empty.*: set SOURCE in the cell above$"):
        find_project("")
    assert [*tmp_path.iterdir()] == []


def test_a_notebook_inside_the_project_needs_no_source(find_project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "docs")
    assert find_project("") == ROOT


@pytest.mark.parametrize("kind", ["zip", "gztar"])
def test_an_archive_is_unpacked_once(find_project: Any, tmp_path: Path, kind: str) -> None:
    make_project(tmp_path / "given" / "styleformer-main")
    archive = shutil.make_archive(str(tmp_path / "given" / "archive"), kind, tmp_path / "given", "styleformer-main")
    assert find_project(archive) == tmp_path / "styleformer" / "styleformer-main"
    os.chdir(tmp_path)
    assert find_project("") == tmp_path / "styleformer" / "styleformer-main"


def test_an_archive_of_something_else_is_reported(find_project: Any, tmp_path: Path) -> None:
    (tmp_path / "given" / "other").mkdir(parents=True)
    archive = shutil.make_archive(str(tmp_path / "archive"), "zip", tmp_path / "given")
    with pytest.raises(ValueError, match=r"archive\.zip does not contain the project: remove the folder styleformer"):
        find_project(archive)
    assert Path.cwd() == tmp_path


def test_a_repository_is_cloned(find_project: Any, tmp_path: Path) -> None:
    repository = make_project(tmp_path / "given")
    git = ["git", "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=x"]):
        subprocess.run([*git, *command], check=True)
    assert find_project(repository) == tmp_path / "styleformer"


def test_a_failing_script_stops_the_notebook(
    notebook: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    scope: dict[str, Any] = {"os": os, "subprocess": subprocess}
    exec(code_cells(notebook)["commands"].source, scope)
    with pytest.raises(RuntimeError, match=r"^dataset_tool\.py ended with exit code 2$"):
        scope["python"]("dataset_tool.py --source='no such folder' --dest=x.zip")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "$ python dataset_tool.py --source='no such folder' --dest=x.zip"
    assert "no such folder" in printed[-1]


def make_output(**fields: Any) -> Any:
    return nbformat.from_dict(fields)


def test_streams_are_normalised(script: ModuleType) -> None:
    rule = "-" * 30 + "\n"
    text = f"\x1b[31mout/x/run\x1b[0m\nreal images: 5 of 9\n{rule}layer 1\nlayer 2\n{rule}total\nat 0.1 ({'0f' * 20})\n"
    output = make_output(output_type="stream", name="stdout", text=text)
    assert script.normalise(output, {"out/x": "OUT"}).text == f"OUT/run\n{rule}...\n{rule}total\nat 0.1\n"
    assert output.text == text
    page = make_output(output_type="display_data", metadata={}, data={PAGE: "<b>out/x</b>", IMAGE: "out/x"})
    assert script.normalise(page, {"out/x": "OUT"}).data == {PAGE: "<b>OUT</b>", IMAGE: "out/x"}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"output_type": "error", "ename": "KeyError", "evalue": "x", "traceback": []}, "KeyError: x"),
        ({"output_type": "stream", "name": "stderr", "text": "careful"}, "output to stderr: careful"),
        ({"output_type": "stream", "name": "stdout", "text": "in /home/me/x"}, "the path /home/me of this machine"),
        (
            {"output_type": "display_data", "metadata": {}, "data": {PAGE: '<a href="/tmp/x">'}},
            "the path /tmp/x of this machine",
        ),
    ],
)
def test_unfit_outputs_are_reported(script: ModuleType, fields: dict[str, Any], problem: str) -> None:
    fit = {
        "output_type": "display_data",
        "metadata": {},
        "data": {IMAGE: "/tmp/x", PAGE: "data:image/png;base64,/tmp/x"},
    }
    cell = nbformat.v4.new_code_cell(outputs=[make_output(**fit), make_output(**fields)], id="a")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    assert script.find_problems(notebook, 2_000_000) == [f"cell a: {problem}"]
    assert len(script.find_problems(notebook, 2_000_001)) == 2


def test_a_missing_package_names_the_extra(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nbformat", None)
    result = CliRunner().invoke(script.main, [])
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "pip install '.[notebook]'" in result.stderr


@pytest.mark.slow
def test_a_failing_cell_is_reported(script: ModuleType) -> None:
    cells = [nbformat.v4.new_code_cell("x = 0", id="settings"), nbformat.v4.new_code_cell("1 / x", id="b")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    with pytest.raises(UserError, match=r"(?s)a cell failed.*ZeroDivisionError"):
        script.execute(notebook, {})
    assert script.execute(notebook, {"x": 2}).cells[1].outputs[0].data["text/plain"] == "0.5"


@pytest.mark.slow
def test_the_notebook_runs(notebook: Any, script: ModuleType, tmp_path: Path) -> None:
    """All cells run in a kernel, twice in the same folder: the second execution resumes the run."""
    settings = {"OUT": str(tmp_path / "out"), "NUM_IMAGES": 64, "TRAIN_OPTIONS": " ".join(SMALLER)}
    executed = script.execute(notebook, settings)
    assert {name: kinds(cell) for name, cell in code_cells(executed).items() if cell.outputs} == OUTPUTS
    (run,) = (tmp_path / "out" / "runs").iterdir()
    assert len((run / "metric-swd500.jsonl").read_text().splitlines()) == 3
    assert Elements(html_of(executed, "report")).found[1][1]["srcdoc"] == (
        tmp_path / "out" / "report" / "report.html"
    ).read_text(encoding="utf-8")
    longer = script.execute(notebook, {**settings, "TRAIN_OPTIONS": " ".join([*SMALLER, "--kimg=0.048"])})
    assert code_cells(longer)["dataset"].outputs == []
    assert [*(tmp_path / "out" / "runs").iterdir()] == [run]
    assert len((run / "metric-swd500.jsonl").read_text().splitlines()) == 4
