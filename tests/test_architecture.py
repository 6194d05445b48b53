"""Import order: dnnlib <- torch_utils <- metrics <- training <- exploration <- scripts <- styleformer."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "dnnlib": {"dnnlib"},
    "torch_utils": {"dnnlib", "torch_utils"},
    "metrics": {"dnnlib", "torch_utils", "metrics"},
    "training": {"dnnlib", "torch_utils", "metrics", "training"},
    "exploration": {"dnnlib", "torch_utils", "metrics", "training", "exploration"},
    "reporting": {"dnnlib", "torch_utils", "metrics", "reporting"},
}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
ALLOWED["styleformer"] = {*ALLOWED, *SCRIPTS, "styleformer"}


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


def test_pyproject_lists_every_package() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        str(p.parent.relative_to(ROOT)).replace("/", ".")
        for name in ALLOWED
        for p in (ROOT / name).rglob("__init__.py")
    }
    assert set(settings["packages"]) == folders
    assert set(settings["py-modules"]) == SCRIPTS


HELP = """
import sys
from click.testing import CliRunner
import generate, projector, style_mixing, train

def run(main, *arguments):
    result = CliRunner().invoke(main, arguments)
    print(result.exit_code, *arguments, result.output.partition("\\n")[0])

for name in generate.main.commands:
    run(generate.main, name, "--help")
    run(generate.main, name)
for main in (generate.main, train.main, projector.main, style_mixing.main):
    run(main, "--help")
    run(main, "--no-such-option")
print("imported:", *sorted({"torch", "numpy", "PIL", "scipy", "matplotlib"} & {*sys.modules}))
"""


def test_help_and_usage_errors_import_no_numeric_library() -> None:
    found = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, check=True)
    *lines, imported = found.stdout.splitlines()
    assert imported == "imported:"
    assert len(lines) == 2 * 8 + 2 * 4
    for line in lines:
        assert line.split()[0] == ("0" if "--help" in line.split(" Usage")[0] else "2"), line
