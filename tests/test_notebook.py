"""docs/colab.ipynb runs from start to end with small settings, without a notebook server."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
from click.testing import CliRunner
from conftest import SMALL

import calc_metrics
import dataset_tool
import generate
import report
import train

NOTEBOOK = Path(__file__).parent.parent / "docs" / "colab.ipynb"
SCRIPTS = {
    "train.py": train.main,
    "generate.py": generate.main,
    "calc_metrics.py": calc_metrics.main,
    "dataset_tool.py": dataset_tool.main,
    "report.py": report.main,
}
# Options appended to each command to keep the run short.
SMALLER = {
    "train.py": [*SMALL, "--g_dict=32,16,16", "--num_layers=1,1,1", "--tick=0.016", "--snap=1", "--device=cpu"],
    "dataset_tool.py": ["--max-images=64", "--workers=1"],
    "calc_metrics.py": ["--device=cpu"],
    "generate.py": ["--device=cpu"],
    "report.py": [],
}


class Notebook:
    """The subset of IPython used by the cells: `!` and `%cd` with names in braces, and IPython.display."""

    def __init__(self, **replaced: Any) -> None:
        self.scope: dict[str, Any] = {}
        self.replaced = replaced
        self.shown: list[Any] = []
        self.commands: list[list[str]] = []

    def run_cell(self, source: str) -> None:
        magic = [line for line in source.splitlines() if line.startswith(("!", "%"))]
        if not magic:
            with patch.dict(sys.modules, self.display()):
                exec(source, self.scope)
            self.scope |= {name: value for name, value in self.replaced.items() if name in self.scope}
            return
        assert magic == source.splitlines(), "a cell must not mix Python and commands"
        for line in magic:
            words = shlex.split(re.sub(r"\{(\w+)\}", lambda match: str(self.scope[match[1]]), line[1:]))
            if words[0] == "python":
                self.run_script(*words[1:])
            else:
                assert words[:2] in (["cd", self.scope["FOLDER"]], ["pip", "install"]), line

    def run_script(self, script: str, *arguments: str) -> None:
        smaller = [] if arguments[0] == "check" else SMALLER[script]
        result = CliRunner().invoke(SCRIPTS[script], [*arguments, *smaller])
        assert result.exit_code == 0, f"{script} {arguments}\n{result.output}"
        self.commands.append([script, *arguments])

    def display(self) -> dict[str, ModuleType]:
        """A stand-in for IPython.display that records the displayed objects."""
        module: Any = ModuleType("IPython.display")
        module.Image = lambda path: ("image", Path(path))
        module.HTML = lambda filename: ("html", Path(filename))
        module.display = self.shown.append
        return {"IPython": ModuleType("IPython"), "IPython.display": module}


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    notebook = Notebook(FOLDER=str(tmp_path), OUT=str(tmp_path / "out"), KIMG=0.032)
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            notebook.run_cell("".join(cell["source"]))
    assert {script for script, *_ in notebook.commands} == set(SCRIPTS)
    assert [kind for kind, _ in notebook.shown] == ["image", "html"]
    assert all(path.stat().st_size > 1000 for _, path in notebook.shown)
    (run,) = (tmp_path / "out" / "runs").iterdir()
    assert len((run / "metric-swd500.jsonl").read_text().splitlines()) >= 2
