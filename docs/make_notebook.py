"""Execute docs/colab.ipynb, and store its outputs in the file.

python docs/make_notebook.py

The notebook runs in a Jupyter kernel, on the CPU, in a temporary folder below out/; this takes about seven minutes on
two cores. The file is replaced only if every cell succeeds and the outputs are fit to be published. Needs the extra
`notebook`.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dnnlib.cli import Script  # noqa: E402
from dnnlib.config import UserError  # noqa: E402
from dnnlib.util import import_extra, write_atomically  # noqa: E402

NOTEBOOK = ROOT / "docs" / "colab.ipynb"
OUTDIR = "out/notebook"  # OUT in the notebook
MAX_BYTES = 2_000_000  # size of the file
HASH = "source_sha256"  # metadata of the notebook: the code that produced the outputs

_TABLE = re.compile(r"^(-{20,}\n)(?:.*\n)+?(-{20,}\n)", re.MULTILINE)  # rows between two rules
_COUNTERS = re.compile(r"^(?:real|generated) images: \d+ of \d+\n", re.MULTILINE)
_COMMIT = re.compile(r" \([0-9a-f]{40}(?:-dirty)?\)")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_DATA_URI = re.compile(r"data:\w+/\w+;base64,[\w+/=]+")
_LOCAL_PATH = re.compile(r"(?<![\w.:/])/(?:home|mnt|opt|root|tmp|usr|Users|var|work)/[\w.-]*")


@click.command(cls=Script)
def main() -> None:
    """Execute docs/colab.ipynb, and store its outputs in the file."""
    nbformat = import_extra("nbformat", "notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (ROOT / OUTDIR).parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="notebook-", dir=(ROOT / OUTDIR).parent) as folder:
        outdir = Path(folder).relative_to(ROOT).as_posix()
        executed = execute(notebook, {"OUT": outdir}, show=click.echo)
    for cell, result in zip(code_cells(notebook), code_cells(executed), strict=True):
        cell.outputs = [normalise(output, {outdir: OUTDIR}) for output in result.outputs]
        cell.execution_count, cell.metadata = result.execution_count, nbformat.from_dict({})
    notebook.metadata[HASH] = source_hash(notebook)
    nbformat.validate(notebook)
    text = nbformat.writes(notebook) + "\n"
    problems = find_problems(notebook, len(text.encode()))
    if problems:
        raise UserError(f"{NOTEBOOK}: not replaced: " + "; ".join(problems))
    write_atomically(NOTEBOOK, text)
    click.echo(f"{NOTEBOOK}: {len(text.encode()) / 1e6:.2f} MB")


def code_cells(notebook: Any) -> list[Any]:
    """Return the code cells of a notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(notebook: Any, settings: Mapping[str, object], show: Any = lambda text: None) -> Any:
    """Return an executed copy of a notebook. Raises UserError if a cell fails.

    `settings` replace values of the cell `settings`. `show` is called with the id of each code cell that starts.
    """
    nbclient = import_extra("nbclient", "notebook")
    import_extra("ipykernel", "notebook")
    executed = copy.deepcopy(notebook)
    (cell,) = (cell for cell in executed.cells if cell.id == "settings")
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in settings.items())
    client = nbclient.NotebookClient(
        executed,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
        coalesce_streams=True,
        record_timing=False,
        on_cell_execute=lambda cell, cell_index: show(cell.id) if cell.cell_type == "code" else None,
    )
    try:
        client.execute(env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    except nbclient.exceptions.CellExecutionError as error:
        raise UserError(f"{NOTEBOOK}: a cell failed:\n{_ESCAPES.sub('', str(error))}") from None
    return executed


def normalise(output: Any, replaced: Mapping[str, str]) -> Any:
    """Return an output with other paths; in streams also without escape sequences, counters and rows of tables."""
    output = copy.deepcopy(output)
    texts = output if output.output_type == "stream" else output.get("data", {})
    for key in {"text", "text/plain", "text/html"} & texts.keys():
        for old, new in replaced.items():
            texts[key] = texts[key].replace(old, new)
    if output.output_type == "stream":
        for pattern in (_ESCAPES, _COUNTERS, _COMMIT):
            output.text = pattern.sub("", output.text)
        output.text = _TABLE.sub(r"\1...\n\2", output.text)
    return output


def source_hash(notebook: Any) -> str:
    """Return a hash of the code of a notebook."""
    return hashlib.sha256("\0".join(cell.source for cell in code_cells(notebook)).encode()).hexdigest()


def find_problems(notebook: Any, num_bytes: int) -> list[str]:
    """Return the reasons not to publish an executed notebook whose file has `num_bytes`."""
    problems = [f"{num_bytes:,} bytes, more than {MAX_BYTES:,}"] if num_bytes > MAX_BYTES else []
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "error":
                problems.append(f"cell {cell.id}: {output.ename}: {output.evalue}")
            if output.get("name") == "stderr":
                problems.append(f"cell {cell.id}: output to stderr: {output.text.strip()[:200]}")
            for path in {path for text in _texts(output) for path in _LOCAL_PATH.findall(_DATA_URI.sub("", text))}:
                problems.append(f"cell {cell.id}: the path {path} of this machine")
    return problems


def _texts(output: Any) -> list[str]:
    """Return the texts of an output, without images."""
    data = output.get("data", {})
    return [output.get("text", ""), *(text for kind, text in data.items() if kind.startswith("text/"))]


if __name__ == "__main__":
    main()
