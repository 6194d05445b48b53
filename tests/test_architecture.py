"""Who may import whom: dnnlib <- torch_utils <- metrics <- training <- exploration <- scripts."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "dnnlib": {"dnnlib"},
    "torch_utils": {"dnnlib", "torch_utils"},
    "metrics": {"dnnlib", "torch_utils", "metrics"},
    "training": {"dnnlib", "torch_utils", "metrics", "training"},
    "exploration": {"dnnlib", "torch_utils", "metrics", "training", "exploration"},
    "reporting": {"dnnlib", "metrics", "reporting"},
}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        ours = _imported(file) & (set(ALLOWED) | SCRIPTS | {"torch"})
        permitted = ALLOWED[package] | (set() if package == "dnnlib" else {"torch"})
        assert ours <= permitted, f"{file.relative_to(ROOT)} imports {ours - permitted}"


def _imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


def test_every_package_is_installed_by_the_project_file() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        str(p.parent.relative_to(ROOT)).replace("/", ".")
        for name in ALLOWED
        for p in (ROOT / name).rglob("__init__.py")
    }
    assert set(settings["packages"]) == folders
    assert set(settings["py-modules"]) == SCRIPTS
