"""Conventions of docs/contributing.md that a parser can check."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (
    "benchmarks", "dnnlib", "docs", "exploration", "metrics", "reporting", "styleformer", "tests", "torch_utils",
    "training",
)  # fmt: skip
FILES = sorted([*ROOT.glob("*.py"), *(file for name in FOLDERS for file in (ROOT / name).rglob("*.py"))])
TEST_MODULES = [file for file in FILES if file.name.startswith("test_")]

# First words of headless clauses, inverted sentences and sentences that begin with a pronoun.
HEADLESS = re.compile(r"(What|Which|How|Where|Who|Whom|Whose|Whoever|Whether|Of|It|Its|They|Their|Those)\b")

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def definitions(file: Path) -> list[tuple[str, Definition]]:
    """Return the module, classes and functions of a file with their line numbers."""
    nodes = (node for node in ast.walk(parse(file)) if isinstance(node, Definition))
    return [(f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", node) for node in nodes]


def headless_docstrings(file: Path) -> list[str]:
    found = ((place, ast.get_docstring(node) or "") for place, node in definitions(file))
    return [f"{place}: {text.splitlines()[0]}" for place, text in found if HEADLESS.match(text)]


def long_functions(file: Path) -> list[str]:
    functions = (
        (place, node)
        for place, node in definitions(file)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    )
    return [place for place, node in functions if (node.end_lineno or 0) - node.lineno + 1 > 60]


def function_names(file: Path) -> list[str]:
    return [node.name for _, node in definitions(file) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("text", ["What is drawn.", "Of all files the newest.", "Its mean."])
def test_headless_openings_are_recognised(text: str) -> None:
    assert HEADLESS.match(text)
    assert not HEADLESS.match("Return whether the file exists.")


def test_docstrings_begin_with_a_noun_or_verb() -> None:
    assert [line for file in FILES for line in headless_docstrings(file)] == []


def test_functions_are_at_most_60_lines() -> None:
    assert [line for file in FILES for line in long_functions(file)] == []


def test_names_of_tests_are_at_most_60_letters() -> None:
    names = [name for file in TEST_MODULES for name in function_names(file) if name.startswith("test_")]
    assert len(names) > 1000
    assert [name for name in names if len(name) > 60] == []


def test_test_modules_do_not_import_each_other() -> None:
    modules = {file.stem for file in TEST_MODULES}
    for file in TEST_MODULES:
        imports = [node for node in ast.walk(parse(file)) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {name.name for node in imports if isinstance(node, ast.Import) for name in node.names}
        names |= {(node.module or "") for node in imports if isinstance(node, ast.ImportFrom)}
        assert not {name.removeprefix("tests.") for name in names} & modules, file.name


def test_network_classes_have_distinct_names() -> None:
    files = (ROOT / "training" / "networks").glob("*.py")
    classes = Counter(node.name for file in files for node in ast.walk(parse(file)) if isinstance(node, ast.ClassDef))
    assert [name for name, count in classes.items() if count > 1] == []
