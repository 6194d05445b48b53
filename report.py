"""Show one or several runs: curves as PNG, and a page for the browser with curves and images, all in one file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from dnnlib.cli import Script, option
from dnnlib.config import UserError
from dnnlib.util import write_atomically
from reporting.charts import find_charts
from reporting.drawing import check_matplotlib, draw
from reporting.page import build_page
from reporting.run_reader import find_runs, read_run


@click.command(cls=Script, context_settings={"max_content_width": 110, "show_default": True})
@click.argument("paths", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@option(
    "--outdir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where to write.  [default: `report` in the folder; of several, beside the first one]",
)
@option(
    "--images",
    "max_images",
    type=click.IntRange(min=2),
    default=60,
    help="Grids of generated images in the page, at most; of each run two in any case.",
)
def main(paths: tuple[Path, ...], outdir: Path | None, max_images: int) -> None:
    """Write report.html and a PNG for each group of curves, of one run or of several over each other.

    RUN is the folder of a run, finished or not, or a folder of runs. What an earlier report wrote is replaced.

    \b
    python report.py runs/00000-mine-cifar-gpus1-batch32
    python report.py runs/00000-mine-cifar-gpus1-batch32 runs/00001-mine-cifar-gpus1-batch32
    python report.py runs --outdir=out/report
    """
    check_matplotlib()
    folders = find_runs(paths)
    runs = [read_run(path, name) for path, name in zip(folders, name_runs(folders), strict=True)]
    shown = [run for run in runs if not run.is_empty]
    for run in runs:
        if run.is_empty:
            click.echo(f"Warning: {run.path}: nothing to show yet, left out", err=True)
    if not shown:
        raise UserError("there is nothing to show yet: the first figures come with the first tick of a run")
    outdir = outdir or (paths[0] if len(paths) == 1 else paths[0].parent) / "report"
    charts = [draw(chart) for chart in find_charts(shown)]
    page = build_page(shown, charts, max_images).encode(errors="backslashreplace")  # names of files can be any bytes
    for run in shown:
        for problem in run.problems:
            click.echo(f"Warning: {run.path}: {problem}", err=True)
    write(outdir, {"report.html": page} | {f"{picture.chart.name}.png": picture.png for picture in charts})
    click.echo(f"{outdir / 'report.html'}, and {len(charts)} charts beside it as PNG")


def name_runs(folders: Sequence[Path]) -> list[str]:
    """Return what each run is called: its folder's name, with as many folders around it as tell it from the others."""
    ends = [_ends(path.resolve()) for path in folders]
    counts = Counter(end for own in ends for end in own)
    return [next(end for end in own if counts[end] == 1) for own in ends]


def _ends(path: Path) -> list[str]:
    """What is left of a path when it begins at each of its folders, the last one first."""
    return [str(Path(*path.parts[-count:])) for count in range(1, len(path.parts) + 1)]


def write(outdir: Path, files: dict[str, bytes]) -> None:
    """Write files into a folder. Raises UserError when that cannot be."""
    try:
        outdir.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(outdir / name, content)
    except OSError as error:
        raise UserError(f"--outdir={outdir}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    main()
