"""report.py: charts match the files, corrupt records cause warnings, and the page is self-contained."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import PATIENCE
from PIL import Image

import report
from dnnlib.util import TeeLog
from metrics.registry import registered_metrics
from reporting import chart_section, drawing, markup, time_left
from reporting.charts import DARK, find_charts
from reporting.memorisation_section import REFERENCES
from reporting.run_reader import find_runs, read_run
from training.health import CONDITIONS, Condition, HealthCheck, TickValues
from training.training_loop import Tick

NAMES = ("Loss/G/loss", "Loss/D/loss", "Loss/signs/real", "Loss/r1_penalty", "Gradients/G_main_norm", "Ours/new_signal")


def make_run(path: Path, ticks: int = 6, grids: Sequence[int] = (4, 8), mode: str = "RGB", side: int = 64) -> Path:
    """Write a run folder as training does, with 2 kimg and 30 seconds per tick."""
    path.mkdir(parents=True)
    options = {"preset": "tiny", "loss": {"r1_gamma": len(path.name)}, "run": {"total_kimg": 20}}
    (path / "training_options.json").write_text(json.dumps(options))
    (path / "stats.jsonl").write_text("".join(tick_line(i) for i in range(ticks)))
    (path / "metric-swd5k.jsonl").write_text("".join(metric_line(2 * i, 100 - i) for i in range(0, ticks, 2)))
    for name in ("reals", "fakes_init", *(f"fakes{kimg:06d}" for kimg in grids)):
        pixels = np.random.RandomState(len(name)).randint(0, 255, (side, side, len(mode)), dtype=np.uint8)
        Image.fromarray(pixels.squeeze()).save(path / f"{name}.png", compress_level=1)
    return path


def tick_line(i: int) -> str:
    values: dict[str, Any] = {"Progress/kimg": 2.0 * i, "Progress/augment": 0.01 * i, "Timing/total_sec": 30.0 * i}
    if i:
        values |= {name: {"mean": 1.0 + i + j, "std": 0.5, "num": 8} for j, name in enumerate(NAMES)}
    return json.dumps(values | {"timestamp": 1e9 + i}) + "\n"


def metric_line(kimg: float | None, value: float, **changes: Any) -> str:
    record = {"metric": "swd5k", "results": {"swd5k": value, "swd5k_32": 2 * value}, "kimg": kimg, "seed": 0}
    return json.dumps(record | changes) + "\n"


def run_report(*arguments: str | Path) -> Result:
    return CliRunner().invoke(report.main, [str(argument) for argument in arguments])


@pytest.fixture
def _without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip chart rendering in tests of other parts."""
    monkeypatch.setattr(report, "draw", lambda chart: drawing.RenderedChart(chart, b"", ()))


class Page(HTMLParser):
    """Parser that collects all tags of a page and checks that each opened tag is closed."""

    VOID = ("meta", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def charts(self) -> dict[str, list[dict[str, Any]]]:
        """Return the hover data of the lines of each chart, by title."""
        shown = [attributes for _, attributes in self.tags if "data-lines" in attributes]
        return {str(chart["aria-label"]): json.loads(str(chart["data-lines"])) for chart in shown}

    def images(self) -> dict[str, Image.Image]:
        """Return the decoded images by their alternative text."""
        found: dict[str, Image.Image] = {}
        for tag, attributes in self.tags:
            if tag == "img":
                head, _, data = str(attributes["src"]).partition(",")
                assert head == "data:image/jpeg;base64"
                image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
                image.load()
                found[str(attributes["alt"])] = image
        return found


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    run = make_run(tmp_path / "00000-<b>&-run", side=800)
    result = run_report(run)
    assert result.exit_code == 0, result.output
    text = (run / "report" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not re.search(r"https?:|//\w+\.|@import|url\((?!#)|<link|<iframe", text)
    assert not any("src" in attributes for tag, attributes in page.tags if tag != "img")
    assert "<b>" not in text
    charts, images = page.charts(), page.images()
    for title in ("Losses of G and D", "Gradient norms", "Augmentation probability p"):
        assert title in charts
    assert charts["Metric swd5k: lower is better"] == [
        {
            "label": "swd5k",
            "colour": "light-dark(#0072B2, #3C86F7)",
            "kimg": [0, 4, 8],
            "seconds": [0, 60, 120],
            "values": [100, 98, 96],
        }
    ]
    assert text.count('class="panel"') == 2 * len(charts)
    assert all(
        f'data-{name}="' in text for name in re.findall(r"dataset\.(\w+)", text)
    )  # attributes that the script reads
    assert "(best 96 at 8 kimg)" in text
    assert "<td>96 at 8 kimg</td><td>96</td>" in text
    for kimg in (0, 4, 8):
        assert images[f"{run.name}: generated at kimg {kimg}"].size == (768, 768)
    assert f"{run.name}: real images" in images
    for name in ("metric-swd5k", "losses", "augment", "gradients", "signs", "regularisers", "others"):
        with Image.open(run / "report" / f"{name}.png") as image:
            assert image.size[0] == 1210


@pytest.mark.usefixtures("_without_charts")
@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_grids_of_any_channels_are_shown(tmp_path: Path, mode: str) -> None:
    run = make_run(tmp_path / "run", mode=mode)
    assert run_report(run).exit_code == 0
    shown = Page((run / "report" / "report.html").read_text()).images()["run: generated at kimg 4"]
    with Image.open(run / "fakes000004.png") as file:
        pixels: Image.Image = file.copy()
    if mode == "RGBA":
        pixels = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels)
    expected = np.asarray(pixels.convert("RGB"), dtype=float).mean()
    assert np.asarray(shown, dtype=float).mean() == pytest.approx(expected, abs=2)


def lines_of(monkeypatch: pytest.MonkeyPatch, *runs: Path) -> dict[str, dict[str, np.ndarray]]:
    """Return the lines plotted in the left half of each PNG chart: kimg and values by colour and dashes."""
    from matplotlib.figure import Figure

    drawn: dict[str, dict[str, np.ndarray]] = {}

    def record(figure: Figure, *args: object, **kwargs: object) -> None:
        if figure.get_suptitle():
            drawn[figure.get_suptitle()] = {
                f"{line.get_color()} {line.get_linestyle()}": np.asarray(line.get_xydata())
                for line in figure.axes[0].get_lines()
                if line.get_marker() != "*"
            }

    monkeypatch.setattr(Figure, "savefig", record)
    monkeypatch.setattr(drawing, "_inline", str)
    for chart in find_charts([read_run(run, run.name) for run in runs]):
        drawing.draw(chart)
    return drawn


def test_the_curves_of_a_run_equal_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = lines_of(monkeypatch, make_run(tmp_path / "run", ticks=5))
    assert drawn["Metric swd5k: lower is better"]["#0072B2 -"].tolist() == [[0, 100], [4, 98], [8, 96]]
    losses = drawn["Losses of G and D"]
    assert losses["#0072B2 -"].tolist() == [[2, 3], [4, 4], [6, 5], [8, 6]]  # D first: names are sorted
    assert losses["#D55E00 -"].tolist() == [[2, 2], [4, 3], [6, 4], [8, 5]]
    assert drawn["Augmentation probability p"]["#0072B2 -"][:, 1].tolist() == pytest.approx([0, 0.01, 0.02, 0.03, 0.04])
    assert next(iter(drawn["Other statistics"].values())).tolist() == [
        [2, 7],
        [4, 8],
        [6, 9],
        [8, 10],
    ]  # unknown names are plotted too
    assert not any("Timing" in title or "timestamp" in title for title in drawn)


def test_runs_of_different_lengths_are_overlaid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = make_run(tmp_path / "long", ticks=9), make_run(tmp_path / "short", ticks=3)
    (long / "metric-swd5k.jsonl").unlink()
    drawn = lines_of(monkeypatch, long, short)
    losses = drawn["Losses of G and D"]
    assert {key: len(points) for key, points in losses.items()} == {
        "#0072B2 -": 8,
        "#0072B2 --": 8,
        "#D55E00 -": 2,
        "#D55E00 --": 2,
    }
    assert list(drawn["Metric swd5k: lower is better"]) == ["#D55E00 -"]  # each run keeps its colour


def test_metrics_of_different_protocols_are_not_compared(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("old", "new", "other")]
    for run, mirror, seed in zip(runs, (True, False, False), (0, 0, 1), strict=True):
        (run / "metric-swd5k.jsonl").write_text(metric_line(4, 90.0, mirror=mirror, seed=seed))

    def notes(*some: Path) -> list[str]:
        charts = find_charts([read_run(run, run.name) for run in some])
        return [chart.note for chart in charts if chart.name == "metric-swd5k"]

    old, new, other = runs
    assert notes(old, new) == ["values not comparable: the runs differ in mirror"]
    assert notes(old, new, other) == ["values not comparable: the runs differ in mirror, seed"]
    assert notes(old) == notes(old, old) == [""]


def test_long_curves_are_drawn_with_a_moving_average(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ticks=1, grids=())
    values = np.random.RandomState(0).rand(5000)
    values[3210] = 7
    lines = [{"Progress/kimg": i, "Loss/G/loss": {"mean": value}} for i, value in enumerate(values)]
    (run / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    chart = next(chart for chart in find_charts([read_run(run, "run")]) if chart.name == "losses")
    assert "faint: every tick" in chart.note
    trend = chart.lines[0].trend().values
    for place in (0, 30, 2500, 4999):
        assert trend[place] == pytest.approx(values[max(place - 50, 0) : place + 51].mean())
    x, y = drawing._extremes(chart.lines[0].curve.kimg, values)
    assert len(x) <= 2 * drawing.SECTIONS
    assert (3210, 7) in set(zip(x, y, strict=True))  # no peak is dropped
    assert y.min() == values.min()


@pytest.mark.parametrize(
    ("metric", "values", "is_log", "best"),
    [
        ("fid50k_full", [300.0, 3.0, 5.0], True, 4),
        ("fid50k_full_mine", [300.0, 3.0, 5.0], True, 4),
        ("fid50k_full", [30.0, 5.0, 5.0], False, 4),
        ("kid50k_full", [0.1, -0.001, 0.1], False, 4),
        ("is50k", [1.0, 2.0, 11.0], False, 8),
        ("from_elsewhere", [1.0, 20.0, 3.0], False, None),
    ],
)
def test_the_best_metric_value_is_marked(
    tmp_path: Path, metric: str, values: list[float], is_log: bool, best: int | None
) -> None:
    run = make_run(tmp_path / "run")
    (run / "metric-swd5k.jsonl").unlink()
    lines = [metric_line(4 * i, 0, results={metric: value}) for i, value in enumerate(values)]
    (run / f"metric-{metric}.jsonl").write_text("".join(lines))
    chart = next(find_charts([read_run(run, "run")]))
    assert chart.is_log == is_log
    line = chart.lines[0]
    assert (None if line.best is None else line.curve.kimg[line.best]) == best
    assert (f"at {best} kimg" in chart.legend()[0].label) == (best is not None)


@pytest.mark.usefixtures("_without_charts")
def test_a_folder_of_runs_reports_all_of_them(tmp_path: Path) -> None:
    make_run(tmp_path / "long", ticks=9)
    make_run(tmp_path / "short", ticks=3)
    (tmp_path / "data").mkdir()
    result = run_report(tmp_path)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "report" / "report.html").read_text()
    assert "16 of 20" in text
    assert "4 of 20" in text


@pytest.mark.usefixtures("_without_charts")
def test_kimg_values_are_printed_in_full(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ticks=1)
    (run / "stats.jsonl").write_text('{"Progress/kimg": 12345.6}\n')
    (run / "training_options.json").write_text('{"run": {"total_kimg": 250000}}')
    assert run_report(run).exit_code == 0
    assert "<td>12345.6 of 250000</td>" in (run / "report" / "report.html").read_text()


def test_skipped_updates_appear_only_where_logged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ticks=2)
    ticks: list[dict[str, float]] = [{}, {"Skipped/D_main": 5.0}, {}, {"Skipped/D_main": 4.0, "Skipped/G_main": 1.0}]
    lines = (json.dumps({"Progress/kimg": i} | tick) + "\n" for i, tick in enumerate(ticks))
    (run / "stats.jsonl").write_text("".join(lines))
    chart = next(chart for chart in find_charts([read_run(run, "run")]) if chart.name == "skipped")
    assert [line.curve.values.tolist() for line in chart.lines] == [[0, 5, 0, 4], [0, 0, 0, 1]]


def test_the_time_of_a_metric_is_interpolated_at_its_kimg(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ticks=5)
    (run / "metric-swd5k.jsonl").write_text("".join(metric_line(kimg, 1.0) for kimg in (0, 3, 8, 50)))
    curve = read_run(run, "run").metrics["swd5k"]
    assert list(curve.seconds[:3]) == [0, 45, 120]
    assert math.isnan(curve.seconds[3])  # a snapshot newer than the truncated log


@pytest.mark.usefixtures("_without_charts")
def test_corrupt_records_are_skipped_with_a_warning(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", side=160)
    with (run / "stats.jsonl").open("a") as file:
        file.write('{"Progress/kimg": \n[1]\n{"Progress/kimg": NaN}\n{"other": 1}\n\x00\xff\n')
        file.write(
            '{"Progress/kimg": 14.0, "Loss/G/loss": {"mean": null}}\n{"Progress/kimg": 16.'
        )  # incomplete, still being written
    with (run / "metric-swd5k.jsonl").open("a") as file:
        file.write(metric_line(4, 1.0, seed=1) + metric_line(None, 5.0) + metric_line(10, 3.0))
    (run / "metric-fid.jsonl").write_text("nonsense\n")
    first, second, third = (run / "fakes000004.png").read_bytes().split(b"IDAT")
    (run / "fakes000004.png").write_bytes(first + b"IDAT" + second + b"\xff\xff\xff\xff" + third)
    (run / "fakes000008.png").write_bytes((run / "fakes000008.png").read_bytes()[:1000])
    (run / "training_options.json").write_text("{")
    result = run_report(run)
    assert result.exit_code == 0, result.output
    for problem in (
        "stats.jsonl: skipped 5 corrupt lines of 12",
        "metric-swd5k.jsonl: skipped 1 lines that are not comparable with the last line",
        "metric-fid.jsonl: skipped 1 corrupt lines of 1",
        "fakes000004.png: cannot be read",
        "fakes000008.png: cannot be read",
        "training_options.json: cannot be read",
    ):
        assert f"Warning: {run}: {problem}" in result.output
        assert problem in (run / "report" / "report.html").read_text()
    read = read_run(run, "run")
    assert read.ticks["Progress/kimg"].kimg[-1] == 14
    assert read.metrics["swd5k"].values[-1] == 3.0
    assert math.isnan(read.total_kimg)


@pytest.mark.usefixtures("_without_charts")
def test_a_run_that_has_just_started_is_reported(tmp_path: Path) -> None:
    begun, empty = tmp_path / "a", make_run(tmp_path / "b", ticks=1, grids=())
    begun.mkdir()
    (begun / "training_options.json").write_text("{}")
    result = run_report(begun)
    assert result.exit_code == 2
    assert "nothing to show yet" in result.output
    assert "Traceback" not in result.output
    shutil.copytree(empty, tmp_path / "c", ignore=shutil.ignore_patterns("*.jsonl"))
    assert 'id="curves"' not in page_of(tmp_path / "c")
    result = run_report(begun, empty, f"--outdir={tmp_path / 'out'}")
    assert result.exit_code == 0, result.output
    assert f"Warning: {begun}: nothing to show yet, skipped" in result.output
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert set(page.images()) == {"b: generated at kimg 0", "b: real images"}
    assert set(page.charts()) == {"Metric swd5k: lower is better", "Augmentation probability p"}


@pytest.mark.usefixtures("_without_charts")
def test_folders_that_are_not_runs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, problem in ((tmp_path, "neither a run"), (tmp_path / "no", "no such folder")):
        result = run_report(path)
        assert result.exit_code == 2
        assert f"{path}: {problem}" in result.output
    run = make_run(tmp_path / "run", ticks=2)
    (tmp_path / "file").write_text("mine")
    result = run_report(run, f"--outdir={tmp_path / 'file'}")
    assert result.exit_code == 2
    assert f"--outdir={tmp_path / 'file'}: cannot be written" in result.output
    assert (tmp_path / "file").read_text() == "mine"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "matplotlib is not installed: pip install '.[metrics]'" in run_report(run).output


@pytest.mark.usefixtures("_without_charts")
def test_the_report_is_written_to_outdir(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "runs" / "a", ticks=2), make_run(tmp_path / "others" / "b", ticks=2)
    for arguments, folder in (
        ([first], first),
        ([tmp_path / "runs"], tmp_path / "runs"),
        ([second, first], second.parent),
    ):
        assert run_report(*arguments).exit_code == 0
        assert (folder / "report" / "report.html").exists()
        shutil.rmtree(folder / "report")


@pytest.mark.usefixtures("_without_charts")
def test_long_series_of_grids_are_thinned(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ticks=2, grids=())
    for kimg in range(1, 30):
        shutil.copy(run / "fakes_init.png", run / f"fakes{kimg:06d}.png")
    assert run_report(run, "--images=5").exit_code == 0
    images = Page((run / "report" / "report.html").read_text()).images()
    assert [name for name in images if "generated at" in name] == [
        f"run: generated at kimg {kimg}" for kimg in (0, 7, 14, 22, 29)
    ]
    other = make_run(tmp_path / "other", ticks=2, grids=range(1, 9))
    assert run_report(run, other, "--images=6", f"--outdir={tmp_path / 'out'}").exit_code == 0
    images = Page((tmp_path / "out" / "report.html").read_text()).images()
    assert len([name for name in images if "generated at" in name]) == 6


@pytest.mark.usefixtures("_without_charts")
def test_warnings_and_environment_of_a_run_are_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ticks=2)
    warning = "Warning: D tells <nothing>"
    (run / "log.txt").write_text(f"{warning}\ntick 1    kimg 2       time\n{warning}\nError: the end\nmore\n")
    starts = [{"kimg": 0.0, "device": "NVIDIA H100", "torch": "2.12"}, {"kimg": 4.0, "device": "cpu", "commit": None}]
    (run / "environment.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    assert run_report(run).exit_code == 0
    text = (run / "report" / "report.html").read_text()
    assert '<span class="finding">D tells &lt;nothing&gt; (2 times)</span>' in text
    assert '<a href="#curves" data-kimg="2">2</a></td><td><span class="finding">Error: the end</span>' in text
    assert "No warning was recorded" not in text
    assert "<th>kimg</th><th>device</th><th>torch</th><th>commit</th>" in text
    assert "<tr><td>run</td><td>0.0</td><td>NVIDIA H100</td><td>2.12</td><td></td></tr>" in text
    assert "<tr><td>run</td><td>4.0</td><td>cpu</td><td></td><td>?</td></tr>" in text


@pytest.mark.usefixtures("_without_charts")
def test_unexpected_files_are_reported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ticks=2)
    for name in ("stats.jsonl", "log.txt", "fakes000004.png"):
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()
    result = run_report(run)
    assert result.exit_code == 0, result.output
    assert "stats.jsonl: cannot be read (Is a directory)" in result.output
    assert "fakes000004.png: cannot be read" in result.output


@pytest.mark.usefixtures("_without_charts")
def test_unusual_names_and_numbers_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / os.fsdecode(b"$body \xff"), ticks=2)
    nested, long = '{"a": ' * 5000 + "1" + "}" * 5000, "1" * 400
    with (run / "stats.jsonl").open("a") as file:
        file.write(f'{nested}\n{{"Progress/kimg": {long}}}\n')
        file.write('{"Progress/kimg": 4, "Loss/G/loss": 1e999, "timestamp": 1700000000000}\n')
    (run / "metric-swd5k.jsonl").write_text(metric_line(0, math.nan) + metric_line(2, 3.0) + metric_line(4, math.nan))
    (run / "metric-fid5k.jsonl").write_text(metric_line(0, math.inf) + metric_line(2, 0).replace("0", long))
    (run / "training_options.json").write_text(nested)
    result = run_report(run)
    assert result.exit_code == 0, result.output
    assert "stats.jsonl: skipped 2 corrupt lines of 5" in result.output
    assert "training_options.json: cannot be read (nested too deeply)" in result.output
    text = (run / "report" / "report.html").read_text()
    assert "<title>$body \\udcff</title>" in text
    assert "<td>4 of ?</td><td>3 at 2 kimg</td><td>3</td><td>?</td><td>?</td><td>?</td><td>?</td>" in text
    assert list(read_run(run, "run").metrics) == ["swd5k"]


@pytest.mark.usefixtures("_without_charts")
def test_a_value_without_a_better_direction_has_no_best(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ticks=2)
    (run / "metric-swd5k_floor.jsonl").write_text(metric_line(2, 1.5, results={"swd5k_floor": 1.5}))
    assert run_report(run).exit_code == 0
    text = (run / "report" / "report.html").read_text()
    assert "<th>swd5k_floor, best</th><th>last</th>" in text
    assert "<td></td><td>1.5</td>" in text


def test_names_are_not_parsed_as_formulas(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ticks=2)
    (run / "metric-swd5k.jsonl").rename(run / "metric-a$b_$c.jsonl")
    runs = [read_run(run, name) for name in ("cost$5_vs_$10", os.fsdecode(b"\xff"))]
    image = drawing.draw(next(find_charts(runs)))
    assert ">a$b_$c</text>" in image.panels[0].svg


def test_lines_are_visually_distinct(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ticks=2)
    values = {f"Gradients/{i}": {"mean": i + 1.0} for i in range(9)}
    (run / "stats.jsonl").write_text(json.dumps({"Progress/kimg": 1.0} | values) + "\n")
    runs = [read_run(run, name) for name in ("a", "b")]
    chart = next(chart for chart in find_charts(runs) if chart.name == "gradients")
    assert len({(line.colour, line.dashes) for line in chart.lines}) == 2 * 9
    assert len({chart_section.swatch(entry) for entry in chart.legend()}) == 2 + 9


def test_runs_with_equal_names_are_distinguished(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a/run", "b/run", "b/other", "c/exp/0", "d/exp/0")]
    assert report.name_runs(folders) == ["a/run", "b/run", "other", "c/exp/0", "d/exp/0"]


def test_a_run_is_shown_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "0", ticks=1)
    (tmp_path / "runs" / "newest").symlink_to(run)
    assert find_runs([run, run.parent / ".." / "runs", tmp_path / "runs" / "newest"]) == [run]


def test_a_repeated_warning_is_listed_by_its_last_occurrence(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ticks=1)
    lines = [f"tick {i}    kimg {i / 2:<7g} time 1s\nWarning: {i % 25}\n" for i in (*range(26), 50)]
    (run / "log.txt").write_text("".join(lines))
    log = read_run(run, "run").log
    assert log is not None
    shown = [(warning.text, warning.first_kimg, warning.last_kimg, warning.count) for warning in log.warnings]
    assert shown == [*((str(i), i / 2, i / 2, 1) for i in range(6, 25)), ("0", 0, 25, 3)]
    assert log.earlier == 5  # 1 to 5
    assert rows_of(page_of(run), "health")[1] == ["", "log.txt has 5 earlier warnings", "", ""]


@pytest.mark.usefixtures("_without_charts")
def test_a_log_that_ends_in_a_traceback_is_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ticks=2)
    (run / "log.txt").write_text("tick 1    kimg 2       time 30s\n")
    with pytest.raises(RuntimeError), TeeLog(run / "log.txt"):
        raise RuntimeError("CUDA error\nCompile with other flags")
    text = page_of(run)
    assert rows_of(text, "health")[1:] == [["2", "Error: RuntimeError: CUDA error", "", ""]]
    assert rows_of(text, "overview")[1][1] == "ended with an error1 warning"


def page_of(*runs: Path) -> str:
    """Return the page that reports on runs."""
    result = run_report(*runs, f"--outdir={runs[0].parent / 'out'}")
    assert result.exit_code == 0, result.output
    return (runs[0].parent / "out" / "report.html").read_text()


def rows_of(text: str, section: str) -> list[list[str]]:
    """Return the texts of the cells of all tables in a section of a page."""
    part = text.partition(f'<section id="{section}">')[2].partition("\n</section>")[0]
    rows = re.findall(r"<tr.*?</tr>", part)
    return [[unescape(re.sub("<.*?>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


@pytest.mark.usefixtures("_without_charts")
def test_options_that_differ_are_grouped_and_marked(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, ticks=1) for name in ("a", "b", "c")]
    long = "x" * 500
    for run, gamma, extra in zip(runs, (1.0, 2.0, 1), ({}, {"path": long}, {"path": None}), strict=True):
        options = {
            "seed": 3,
            "loss": {"r1_gamma": gamma, "penalty": "exact"},
            "data": extra,
            "run": {"nan": [gamma < 2]},
        }
        (run / "training_options.json").write_text(json.dumps(options))
    text = page_of(*runs)
    assert rows_of(text, "options") == [
        ["option", "a", "b", "c"],
        ["data"],
        ["data.path", "(no such option)", long, "null"],
        ["loss"],
        ["loss.r1_gamma", "1.0", "2.0", "1"],
        ["run"],
        ["run.nan", "[true]", "[false]", "[true]"],
    ]
    assert re.findall("<mark.*?>(.*?)</mark>", text) == [long, "null", "2.0", "[false]"]
    assert f'<mark class="long">{long}</mark>' in text
    assert "Marked values differ from those of a. The other 2 options are equal in all runs." in text


@pytest.mark.usefixtures("_without_charts")
def test_runs_with_equal_options_are_said_to_be_equal(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, ticks=1) for name in ("a", "b")]
    assert "All 3 options are equal in these 2 runs." in page_of(*runs)
    assert rows_of(page_of(runs[0]), "options") == []


def timed_run(path: Path, seconds: Sequence[float], log: str = "", last: float = 1e9) -> Path:
    """Write a run with a tick of 2 kimg at each of these training times, the last at a time since 1970."""
    run = make_run(path, ticks=0, grids=())
    ticks = [
        {"Progress/kimg": 2.0 * i, "Timing/total_sec": second, "timestamp": last - seconds[-1] + second}
        for i, second in enumerate(seconds)
    ]
    (run / "stats.jsonl").write_text("".join(json.dumps(tick) + "\n" for tick in ticks))
    (run / "training_options.json").write_text('{"run": {"total_kimg": 100, "snapshot_ticks": 3}}')
    (run / "log.txt").write_text(log)
    return run


def test_the_pace_covers_whole_intervals_between_snapshots(tmp_path: Path) -> None:
    """The first 20 ticks take 100 s; then a tick takes 10 s, and every third one 70 s, because of a metric."""
    slow, steps = [100.0 * i for i in range(20)], np.cumsum([10.0 + 60.0 * (i % 3 == 2) for i in range(22)])
    pace = time_left.measure_pace(read_run(timed_run(tmp_path / "run", [*slow, *(1900 + steps)]), "run"))
    assert pace.ticks == 21
    assert pace.seconds_per_kimg == pytest.approx((10 + 10 + 70) / 6)
    assert pace.interval == 70
    first = time_left.measure_pace(read_run(timed_run(tmp_path / "first", [0.0, 8.0, 12.0]), "first"))
    assert (first.ticks, first.seconds_per_kimg) == (2, 3.0)
    assert math.isnan(time_left.measure_pace(read_run(timed_run(tmp_path / "new", [0.0]), "new")).seconds_per_kimg)


@pytest.mark.usefixtures("_without_charts")
def test_time_left_and_state_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_700_000_000.0  # 2023-11-14 22:13:20 UTC
    monkeypatch.setattr("time.time", lambda: now)
    start, stop = "Training on cpu\n", "Stopped; --resume=latest resumes this run: x\n"
    runs = [
        timed_run(tmp_path / "a", [10.0 * i for i in range(11)], start + stop + start, last=now - 25),
        timed_run(tmp_path / "b", [10.0 * i for i in range(11)], start, last=now - 35),
        timed_run(tmp_path / "c", [10.0 * i for i in range(11)], start + stop, last=now - 25),
        timed_run(tmp_path / "d", [10.0 * i for i in range(11)], f"{start}Error: out of memory\n", last=now - 25),
        timed_run(tmp_path / "e", [10.0 * i for i in range(51)], start, last=now - 86400),
        timed_run(tmp_path / "f", [10.0 * i for i in range(51)], f"{start}Error: disk full\n", last=now - 86400),
        timed_run(tmp_path / "g", [10.0 * i for i in range(11)], f"{start}Done: x\n", last=now - 86400),
    ]
    (runs[-1] / "training_options.json").unlink()
    text = page_of(*runs)
    states = [row[1] for row in rows_of(text, "overview")[1:8]]
    failed = "ended with an error1 warning"
    assert states == ["last tick 25s ago", "no tick for 35s", "stopped", failed, "done", failed, "done1 warning"]
    rows = rows_of(text, "overview")[9:]
    left = ["80", "5 sec/kimg", "9 ticks", "6m 40s"]  # 80 kimg at 10 s per 2 kimg
    assert rows == [
        ["a", *left, "2023-11-14 22:19 UTC"],  # 6 min 40 s after the last tick at 22:12:55
        ["b", *left, "no tick for 35s"],
        ["c", *left, "stopped"],
        ["d", *left, "ended with an error"],
        ["e", "0", "", "", "", "done"],
        ["f", "0", "5 sec/kimg", "21 ticks", "0s", "ended with an error"],
        ["g", "0", "", "", "", "done"],
    ]
    assert "Time left" not in page_of(runs[4])


class Always(HealthCheck):
    """Health check whose conditions are all met at once."""

    def newly_met(self, values: TickValues) -> list[Condition]:
        return list(CONDITIONS)


@pytest.mark.usefixtures("_without_charts")
def test_health_lists_warnings_with_remedy_and_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"Progress/kimg": 2.0016, "Loss/scores/real": {"mean": 7.25}, "Images/diversity": 0.01}
    sick = make_run(tmp_path / "sick", ticks=0, grids=())
    skipped = {"Progress/kimg": 4.0, "Skipped/D_main": 3.0}
    (sick / "stats.jsonl").write_text(
        "".join(json.dumps(tick) + "\n" for tick in (values, skipped, {"Progress/kimg": 6}))
    )
    trainer = SimpleNamespace(ada=SimpleNamespace(is_saturated=lambda p: False))
    tick = Tick(1, 0, is_first=False, is_last=False, stats={}, values={"Progress/augment": 0.0})
    Always().on_tick(cast(Any, trainer), tick)
    printed = capsys.readouterr().out
    log = f"tick 1    kimg 2.0016  time 9s\n{printed}Warning: 3 updates of D_main skipped: values were not finite\n"
    (sick / "log.txt").write_text(log)
    well = make_run(tmp_path / "well", ticks=2)
    (well / "log.txt").write_text("tick 0    kimg 0\n")
    unknown = make_run(tmp_path / "unknown", ticks=2)
    text = page_of(sick, well, unknown)
    _, label, update, *warnings = rows_of(text, "health")
    assert label == ["sick"]
    assert update[:2] == ["4", "3 updates of D_main skipped in 1 of 3 ticks: values were not finite"]
    assert len(warnings) == len(CONDITIONS)
    for row, condition in zip(warnings, CONDITIONS, strict=True):
        finding, _, remedy = condition.message.partition(": ")
        assert row[:2] == ["2.0016", finding]
        assert row[2].startswith(f"{remedy}. docs" if remedy else "docs")
        assert row[2].endswith(f"docs/troubleshooting.md, “{condition.name}”")
        assert row[3] == "logits: real 7.25, diversity: 0.01"
    assert ">No warning was recorded: well.<" in text
    assert ">Warnings are unknown, because log.txt cannot be read: unknown.<" in text


@pytest.mark.usefixtures("_without_charts")
def test_memorisation_is_shown_if_it_was_computed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ticks=2)
    assert 'id="memorisation"' not in page_of(run)
    records = {
        "authpct5k": [{"authpct5k": 50.0}, {"authpct5k": 61.5}],
        "fld5k_dinov2": [{"fld5k_dinov2": 12.5, "fld5k_dinov2_generalisation_gap": -3.25}],
        "fid5k_full": [{"fid5k_full": 9.0, "fid5k_full_train": 10.0, "fid5k_full_holdout": 12.5}],
    }
    for name, results in records.items():
        lines = [metric_line(2.0 * i, 0, metric=name, results=values) for i, values in enumerate(results)]
        (run / f"metric-{name}.jsonl").write_text("".join(lines))
    rows = rows_of(page_of(run), "memorisation")
    assert [row[:2] for row in rows[1:]] == [
        ["authpct5k", "61.5 at 2 kimg"],
        ["fid5k_full_holdout minus _train", "2.5 at 0 kimg"],
        ["fld5k_dinov2", "12.5 at 0 kimg"],
        ["fld5k_dinov2_generalisation_gap", "-3.25 at 0 kimg"],
    ]
    assert all("" not in row for row in rows)


def test_every_metric_of_memorisation_has_reference_values() -> None:
    specs = [spec for spec in registered_metrics() if spec.part == "train"]
    expected = {(spec.pattern.removesuffix("_dinov2"), value) for spec in specs for value in spec.values}
    assert set(REFERENCES) == expected


@pytest.mark.usefixtures("_without_charts")
def test_the_best_of_comparable_runs_is_marked(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, ticks=3) for name in ("a", "b")]
    (runs[1] / "metric-swd5k.jsonl").write_text(metric_line(4, 12.0))
    assert re.findall('<strong class="best">(.*?)</strong>', page_of(*runs)) == ["12 at 4 kimg"]
    (runs[1] / "metric-swd5k.jsonl").write_text(metric_line(4, 12.0, seed=1))
    assert 'class="best"' not in page_of(*runs)


@pytest.mark.usefixtures("_without_charts")
def test_equal_real_images_are_shown_once(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, ticks=1, grids=()) for name in ("a", "b", "c")]
    Image.new("RGB", (64, 64), "red").save(runs[2] / "reals.png")
    names = [name for name in Page(page_of(*runs)).images() if "real" in name]
    assert names == ["a, b: real images", "c: real images"]
    assert re.findall("<figcaption>(a, b|c|reals.png)</figcaption>", page_of(*runs)) == ["a, b", "c"]
    assert re.findall("<figcaption>(a, b|reals.png)</figcaption>", page_of(*runs[:2])) == ["reals.png"]


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour `#rrggbb` (WCAG 2)."""
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_charts_are_legible_on_a_dark_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ticks=3)
    card = re.search(r"--card: light-dark\(#fff, (#\w{6})\)", (markup.FOLDER / "page.css").read_text())
    assert card
    for colour in DARK:
        assert (luminance(colour) + 0.05) / (luminance(card[1]) + 0.05) > 4.5
    for chart in find_charts([read_run(run, "run")]):
        for panel in drawing.draw(chart).panels:
            fixed = re.sub(r"light-dark\(#\w{6}, #\w{6}\)", "", panel.svg)
            assert not re.search(r"#[0-9a-f]{6}\b", fixed, re.IGNORECASE)
            assert "currentColor" in fixed


def probe(chromium: str, page: Path, script: str, head: str = "", *flags: str) -> Any:
    """Return the value that a script computes once a page is loaded; `head` runs before the scripts of the page."""
    text = page.read_text().replace("<header>", f"<script>{head}</script><header>")
    found = f"document.body.dataset.found = JSON.stringify({script})"
    text = text.replace("</body>", f"<script>onload = () => {{ {found} }}</script></body>")
    own = page.with_name("probe.html")
    own.write_text(text)
    profile = f"--user-data-dir={page.parent / 'profile'}"
    options = ("--headless", "--no-sandbox", "--disable-gpu", profile, "--dump-dom", *flags)
    command = [chromium, *options, own.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    match = re.search(r'data-found="([^"]*)"', dom.stdout)
    assert match
    return json.loads(unescape(match[1]))


@pytest.fixture
def two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a page with a run of 12 kimg with five grids, and one of 6 kimg with three."""
    monkeypatch.setattr(drawing, "draw_png", lambda chart: b"")  # the page uses SVG
    long = make_run(tmp_path / "long", ticks=7, grids=(3, 6, 9, 12))
    page_of(long, make_run(tmp_path / "short", ticks=4, grids=(2, 6)))
    return tmp_path / "out" / "report.html"


SLIDERS = """(() => {
  const [long, short] = [...document.querySelectorAll(".frames")];
  const shown = run => [...run.querySelectorAll("figure:not([hidden])")].map(frame => frame.dataset.kimg).join();
  const places = name => {
    const panel = [...document.querySelectorAll(".chart[aria-label^=Losses] .panel")]
      .find(element => JSON.parse(element.dataset.axis).name === name);
    const axis = JSON.parse(panel.dataset.axis), scale = (axis.last - axis.first) / (axis.right - axis.left);
    const value = place => axis.first + (parseFloat(place.style.left) / 100 - axis.left) * scale;
    return [...panel.querySelectorAll(".place")].map(place => Math.round(value(place)));
  };
  const state = () => [shown(long), shown(short), places("kimg"), places("seconds")];
  const move = (run, index) => {
    const slider = run.querySelector("input");
    slider.value = index;
    slider.dispatchEvent(new Event("input"));
  };
  const states = [state()];
  move(long, 1);
  states.push(state());
  move(long, 4);
  states.push(state());
  document.querySelector("#link").click();
  move(long, 2);
  states.push(state());
  document.querySelector("#link").click();
  states.push(state());
  const label = short.querySelector("input").getAttribute("aria-valuetext");
  return [states, label, short.querySelector("input").ariaLabel];
})()"""


def test_linked_sliders_show_the_nearest_kimg(two_runs: Path, chromium: str) -> None:
    """The time at a kimg is 15 s per kimg in both runs; the charts begin at 2 kimg."""
    states, text, label = probe(chromium, two_runs, SLIDERS)
    assert states == [
        ["12", "6", [12], [180, 90]],
        ["3", "2", [3], [45, 30]],
        ["12", "6", [12], [180, 90]],
        ["6", "6", [6, 6], [90, 90]],  # unlinked: a mark per run
        ["6", "6", [6], [90, 90]],
    ]
    assert (text, label) == ("kimg 6", "kimg of the images of short")


def test_all_grids_of_the_same_kimg_are_reachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chromium: str
) -> None:
    """A run that writes a snapshot before 1 kimg has two grids at kimg 0: fakes_init.png and fakes000000.png."""
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: sorted(glob(path, pattern)))  # fakes000000.png first
    monkeypatch.setattr(drawing, "draw_png", lambda chart: b"")  # the page uses SVG
    page_of(make_run(tmp_path / "run", ticks=2, grids=(0, 2)))
    script = """[0, 1, 2].map(index => {
      const slider = document.querySelector(".frames input");
      slider.value = index;
      slider.dispatchEvent(new Event("input"));
      return [slider.value, document.querySelector(".frames figure:not([hidden])").textContent];
    })"""
    found = probe(chromium, tmp_path / "out" / "report.html", script)
    captions = ["kimg 0, fakes_init.png", "kimg 0, fakes000000.png", "kimg 2, fakes000002.png"]
    assert found == [[str(i), caption] for i, caption in enumerate(captions)]


def test_playing_moves_all_linked_runs(two_runs: Path, chromium: str) -> None:
    script = """(() => {
      const now = () => [...document.querySelectorAll(".frames figure:not([hidden])")].map(x => x.dataset.kimg);
      const steps = [];
      let tick = null;
      window.setInterval = step => { tick = step; return 1; };
      window.clearInterval = () => { tick = null; };
      const button = document.querySelector(".frames button");
      button.click();
      const names = [button.textContent];
      while (tick && steps.length < 10) { steps.push(now()); tick(); }
      return [[...steps, now()], [...names, button.textContent]];
    })()"""
    steps, names = probe(chromium, two_runs, script)
    assert steps == [["0", "0"], ["3", "2"], ["6", "6"], ["9", "6"], ["12", "6"]]
    assert names == ["Pause", "Play"]


def test_a_chosen_theme_is_applied_and_remembered(two_runs: Path, chromium: str) -> None:
    script = """(() => {
      const text = document.querySelector(".panel text");
      const line = document.querySelector(".panel path[style*=light-dark]");
      const state = () => [getComputedStyle(document.body).backgroundColor, getComputedStyle(text).fill,
        getComputedStyle(line).stroke, localStorage.getItem("report-theme")];
      const states = [state()];
      for (const name of ["light", "dark"]) {
        document.querySelector(`[name=theme][value=${name}]`).click();
        states.push(state());
      }
      return states;
    })()"""
    light = ["rgb(243, 244, 246)", "rgb(36, 41, 47)", "rgb(0, 114, 178)"]
    dark = ["rgb(13, 17, 23)", "rgb(213, 219, 225)", "rgb(60, 134, 247)"]
    stored = 'localStorage.setItem("report-theme", "dark")'
    assert probe(chromium, two_runs, script, stored) == [[*dark, "dark"], [*light, "light"], [*dark, "dark"]]
    for number, system in ((0, dark), (1, light)):
        flag = f"--blink-settings=preferredColorScheme={number}"
        states = probe(chromium, two_runs, script, "localStorage.clear()", flag)
        assert states == [[*system, None], [*light, "light"], [*dark, "dark"]]


def test_a_narrow_page_does_not_scroll_sideways(two_runs: Path, chromium: str) -> None:
    frame = two_runs.with_name("frame.html")
    narrow = f'<iframe srcdoc="{escape(two_runs.read_text())}" style="width: 390px; height: 800px; border: 0"></iframe>'
    wide = narrow.replace("390px", "1900px")
    frame.write_text(f"<header></header><body>{narrow}{wide}</body>")
    script = """[...document.querySelectorAll("iframe")].map(frame => {
      const root = frame.contentDocument.documentElement;
      const overflow = root.scrollWidth - root.clientWidth;
      return [frame.contentWindow.innerWidth, overflow, root.querySelectorAll(".panel").length];
    })"""
    sizes = probe(chromium, frame, script)
    assert sizes == [[390, 0, 14], [1900, 0, 14]]


def test_a_browser_shows_every_chart_and_reacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chromium: str) -> None:
    run = make_run(tmp_path / "run", ticks=3)
    monkeypatch.setattr(drawing, "draw_png", lambda chart: b"")  # the page uses SVG
    assert run_report(run).exit_code == 0
    script = """(() => {
      const panel = document.querySelector(".chart[aria-label^=Losses] .panel"), box = panel.getBoundingClientRect();
      const axis = JSON.parse(panel.dataset.axis);
      const at = axis.left + (axis.right - axis.left) * (3.9 - axis.first) / (axis.last - axis.first);
      panel.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + at * box.width}));
      const reading = [...panel.querySelectorAll(".reading div")].map(line => line.textContent);
      const shown = () => [...document.querySelectorAll(".frames figure")].findIndex(frame => !frame.hidden);
      const slider = document.querySelector("[type=range]"), before = shown();
      slider.value = 1;
      slider.dispatchEvent(new Event("input"));
      const widths = [...document.images].map(image => image.naturalWidth);
      return [before, shown(), Math.min(...widths), widths.length, reading];
    })()"""
    page = run / "report" / "report.html"
    before, after, narrowest, count, reading = probe(chromium, page, script)
    assert (before, after) == (2, 1)
    assert narrowest == 64
    assert count == len(Page(page.read_text()).images())
    assert reading == ["kimg: 3.9", "4  Loss/D/loss", "3  Loss/G/loss"]
