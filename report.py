"""Report on one or several runs: curves as PNG, and a self-contained HTML page with curves and images."""

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
from reporting.laboratory import LABORATORY_FILE, read_laboratory
from reporting.laboratory_chart import draw_laboratory, draw_laboratory_svg
from reporting.laboratory_page import build_laboratory_page
from reporting.page import build_page
from reporting.run_reader import find_runs, read_run


@click.command(cls=Script, context_settings={"max_content_width": 110, "show_default": True})
@click.argument("paths", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@option(
    "--outdir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Output folder.  [default: `report` in RUN; with several RUNs, next to the first]",
)
@option(
    "--images",
    "max_images",
    type=click.IntRange(min=2),
    default=60,
    help="Maximum number of image grids in the page; each run shows at least two.",
)
def main(paths: tuple[Path, ...], outdir: Path | None, max_images: int) -> None:
    """Report on one run, or compare several: report.html, and a PNG for each group of curves.

    RUN is the folder of a run, finished or not, a folder of runs, or a laboratory (benchmarks/learning.py). An earlier
    report is overwritten.

    \b
    python report.py runs/00000-mine-cifar-gpus1-batch32
    python report.py runs/00000-mine-cifar-gpus1-batch32 runs/00001-mine-cifar-gpus1-batch32
    python report.py runs --outdir=out/report
    """
    check_matplotlib()
    laboratories = [path for path in paths if (path / LABORATORY_FILE).is_file()]
    if laboratories:
        report_laboratory(laboratories[0], paths, outdir, max_images)
    else:
        report_runs(paths, outdir, max_images)


def report_laboratory(path: Path, paths: Sequence[Path], outdir: Path | None, max_images: int) -> None:
    """Write the report of a laboratory. Raises UserError if further paths are given."""
    if len(paths) > 1:
        raise UserError(f"{path}: a laboratory has a report of its own; specify no other folders")
    laboratory = read_laboratory(path)
    if not laboratory.trials:
        raise UserError(f"{path}: there is nothing to show yet: no trial has ended")
    outdir = outdir or path / "report"
    metrics = laboratory.question.metrics
    charts = {metric: draw_laboratory(laboratory, metric) for metric in metrics}
    drawings = {metric: draw_laboratory_svg(laboratory, metric) for metric in metrics}
    page = build_laboratory_page(laboratory, drawings, path, max_images).encode(errors="backslashreplace")
    write(outdir, {"report.html": page} | {f"chart-{metric}.png": png for metric, png in charts.items()})
    click.echo(f"{outdir / 'report.html'}, and {len(charts)} charts as PNG in the same folder")


def report_runs(paths: Sequence[Path], outdir: Path | None, max_images: int) -> None:
    """Write the report of runs."""
    folders = find_runs(paths)
    runs = [read_run(path, name) for path, name in zip(folders, name_runs(folders), strict=True)]
    shown = [run for run in runs if not run.is_empty]
    for run in runs:
        if run.is_empty:
            click.echo(f"Warning: {run.path}: nothing to show yet, skipped", err=True)
    if not shown:
        raise UserError("there is nothing to show yet: a run writes its first statistics after the first tick")
    outdir = outdir or (paths[0] if len(paths) == 1 else paths[0].parent) / "report"
    charts = [draw(chart) for chart in find_charts(shown)]
    page = build_page(shown, charts, max_images).encode(errors="backslashreplace")  # file names may be undecodable
    for run in shown:
        for problem in run.problems:
            click.echo(f"Warning: {run.path}: {problem}", err=True)
    write(outdir, {"report.html": page} | {f"{drawn.chart.name}.png": drawn.png for drawn in charts})
    click.echo(f"{outdir / 'report.html'}, and {len(charts)} charts as PNG in the same folder")


def name_runs(folders: Sequence[Path]) -> list[str]:
    """Return a unique name per run: its folder name, preceded by as many parent folders as necessary."""
    suffixes = [_suffixes(path.resolve()) for path in folders]
    counts = Counter(suffix for own in suffixes for suffix in own)
    return [next(suffix for suffix in own if counts[suffix] == 1) for own in suffixes]


def _suffixes(path: Path) -> list[str]:
    """Return the trailing parts of a path, shortest first: `c`, `b/c`, `a/b/c`."""
    return [str(Path(*path.parts[-count:])) for count in range(1, len(path.parts) + 1)]


def write(outdir: Path, files: dict[str, bytes]) -> None:
    """Write files to a folder. Raises UserError if it cannot be written."""
    try:
        outdir.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(outdir / name, content)
    except OSError as error:
        raise UserError(f"--outdir={outdir}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    main()
