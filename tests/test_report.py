"""report.py: what is drawn is what the files hold, what is damaged is told, and the page needs nothing but itself."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import PATIENCE
from PIL import Image

import report
from reporting import charts
from reporting.runs import read_run

NAMES = ("Loss/G/loss", "Loss/D/loss", "Loss/signs/real", "Loss/r1_penalty", "Gradients/G_main_norm", "Ours/new_signal")


def make_run(path: Path, ticks: int = 6, grids: Sequence[int] = (4, 8), mode: str = "RGB") -> Path:
    """A run's folder as training writes it, 2 kimg and 30 seconds a tick."""
    path.mkdir(parents=True)
    options = {"preset": "tiny", "loss": {"r1_gamma": len(path.name)}, "run": {"total_kimg": 20}}
    (path / "training_options.json").write_text(json.dumps(options))
    (path / "stats.jsonl").write_text("".join(tick_line(i) for i in range(ticks)))
    (path / "metric-swd5k.jsonl").write_text("".join(metric_line(2 * i, 100 - i) for i in range(0, ticks, 2)))
    for name in ("reals", "fakes_init", *(f"fakes{kimg:06d}" for kimg in grids)):
        pixels = np.random.RandomState(len(name)).randint(0, 255, (800, 800, len(mode)), dtype=np.uint8)
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
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts of one pixel, for what is not about them."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    monkeypatch.setattr(charts, "_draw", lambda *args, **kwargs: buffer.getvalue())


class Page(HTMLParser):
    """All tags of a page, and whether each that was opened was closed."""

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

    def images(self) -> dict[str, Image.Image]:
        """The pictures by their description, decoded."""
        found: dict[str, Image.Image] = {}
        for tag, attributes in self.tags:
            if tag == "img":
                head, _, data = str(attributes["src"]).partition(",")
                assert head in ("data:image/png;base64", "data:image/jpeg;base64")
                image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
                image.load()
                found[str(attributes["alt"])] = image
        return found


def test_the_page_holds_all_that_it_shows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "00000-<b>&-run")
    result = run_report(run)
    assert result.exit_code == 0, result.output
    text = (run / "report" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not re.search(r"https?:|//\w+\.|@import|url\(|<link|<iframe", text)
    assert not any("src" in attributes for tag, attributes in page.tags if tag != "img")
    assert "<b>" not in text
    images = page.images()
    for title in ("swd5k", "Losses of G and D", "Norms of the gradients", "Probability p of the augmentation"):
        assert title in images
    for kimg in (0, 4, 8):
        assert images[f"{run.name}: generated at kimg {kimg}"].size == (768, 768)
    assert f"{run.name}: real images" in images
    for name in ("metric-swd5k", "losses", "augment", "gradients", "signs", "regularisers", "others"):
        with Image.open(run / "report" / f"{name}.png") as picture:
            assert picture.size[0] == 1210


@pytest.mark.usefixtures("_undrawn")
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
    """What matplotlib is told to draw in the left half of each chart: kimg and values by colour and dashes."""
    from matplotlib.figure import Figure

    drawn: dict[str, dict[str, np.ndarray]] = {}

    def note(figure: Figure, *args: object, **kwargs: object) -> None:
        lines = figure.axes[0].get_lines()
        drawn[figure.get_suptitle()] = {
            f"{line.get_color()} {line.get_linestyle()}": np.asarray(line.get_xydata()) for line in lines
        }

    monkeypatch.setattr(Figure, "savefig", note)
    read = [read_run(run, run.name) for run in runs]
    list(charts.draw(read))
    return drawn


def test_one_run_is_drawn_as_it_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = lines_of(monkeypatch, make_run(tmp_path / "run", ticks=5))
    assert drawn["Metric swd5k"]["C0 -"].tolist() == [[0, 100], [4, 98], [8, 96]]
    losses = drawn["Losses of G and D"]
    assert losses["C0 -"].tolist() == [[2, 3], [4, 4], [6, 5], [8, 6]]  # D, as names are in order
    assert losses["C1 -"].tolist() == [[2, 2], [4, 3], [6, 4], [8, 5]]
    assert drawn["Probability p of the augmentation"]["C0 -"][:, 1].tolist() == pytest.approx(
        [0, 0.01, 0.02, 0.03, 0.04]
    )
    assert next(iter(drawn["Other figures"].values())).tolist() == [[2, 7], [4, 8], [6, 9], [8, 10]]  # no name is lost
    assert not any("Timing" in title or "timestamp" in title for title in drawn)


def test_runs_of_different_lengths_lie_over_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = make_run(tmp_path / "long", ticks=9), make_run(tmp_path / "short", ticks=3)
    (long / "metric-swd5k.jsonl").unlink()
    drawn = lines_of(monkeypatch, long, short)
    losses = drawn["Losses of G and D"]
    assert {key: len(points) for key, points in losses.items()} == {"C0 -": 8, "C0 --": 8, "C1 -": 2, "C1 --": 2}
    assert list(drawn["Metric swd5k"]) == ["C1 -"]  # the colour stays the run's


@pytest.mark.usefixtures("_undrawn")
def test_a_folder_of_runs_is_all_of_them(tmp_path: Path) -> None:
    make_run(tmp_path / "long", ticks=9)
    make_run(tmp_path / "short", ticks=3)
    (tmp_path / "data").mkdir()
    result = run_report(tmp_path)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "report" / "report.html").read_text()
    assert "loss.r1_gamma: 4 -&gt; 5" in text
    assert "16 of 20" in text
    assert "4 of 20" in text


def test_the_time_of_a_metric_is_that_of_its_kimg(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ticks=5)
    (run / "metric-swd5k.jsonl").write_text("".join(metric_line(kimg, 1.0) for kimg in (0, 3, 8, 50)))
    curve = read_run(run, "run").metrics["swd5k"]
    assert list(curve.seconds[:3]) == [0, 45, 120]
    assert math.isnan(curve.seconds[3])  # of a snapshot beyond what the log still has


@pytest.mark.usefixtures("_undrawn")
def test_what_is_damaged_is_left_out_and_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "stats.jsonl").open("a") as file:
        file.write('{"Progress/kimg": \n[1]\n{"Progress/kimg": NaN}\n{"other": 1}\n\x00\xff\n')
        file.write('{"Progress/kimg": 14.0, "Loss/G/loss": {"mean": null}}\n{"Progress/kimg": 16.')  # being written
    with (run / "metric-swd5k.jsonl").open("a") as file:
        file.write(metric_line(4, 1.0, seed=1) + metric_line(None, 5.0) + metric_line(10, 3.0))
    (run / "metric-fid.jsonl").write_text("nonsense\n")
    (run / "fakes000008.png").write_bytes((run / "fakes000008.png").read_bytes()[:1000])
    (run / "training_options.json").write_text("{")
    result = run_report(run)
    assert result.exit_code == 0, result.output
    for problem in (
        "stats.jsonl: left out 5 of 12 lines, which are damaged",
        "metric-swd5k.jsonl: left out 1 lines that do not compare with the last one",
        "metric-fid.jsonl: left out 1 of 1 lines, which are damaged",
        "fakes000008.png: cannot be read",
        "training_options.json: cannot be read",
    ):
        assert f"Warning: {run}: {problem}" in result.output
        assert problem in (run / "report" / "report.html").read_text()
    read = read_run(run, "run")
    assert read.ticks["Progress/kimg"].kimg[-1] == 14
    assert read.metrics["swd5k"].values[-1] == 3.0
    assert math.isnan(read.total_kimg)


@pytest.mark.usefixtures("_undrawn")
def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    begun, empty = tmp_path / "a", make_run(tmp_path / "b", ticks=1, grids=())
    begun.mkdir()
    (begun / "training_options.json").write_text("{}")
    result = run_report(begun)
    assert result.exit_code == 2
    assert "nothing to show yet" in result.output
    assert "Traceback" not in result.output
    result = run_report(begun, empty, f"--outdir={tmp_path / 'out'}")
    assert result.exit_code == 0, result.output
    assert f"Warning: {begun}: nothing to show yet, left out" in result.output
    assert set(Page((tmp_path / "out" / "report.html").read_text()).images()) == {
        "swd5k",
        "Probability p of the augmentation",
        "b: generated at kimg 0",
        "b: real images",
    }


@pytest.mark.usefixtures("_undrawn")
def test_what_is_no_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.usefixtures("_undrawn")
def test_a_report_goes_into_the_folder_that_was_named(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "runs" / "a", ticks=2), make_run(tmp_path / "others" / "b", ticks=2)
    for arguments, folder in (
        ([first], first),
        ([tmp_path / "runs"], tmp_path / "runs"),
        ([second, first], second.parent),
    ):
        assert run_report(*arguments).exit_code == 0
        assert (folder / "report" / "report.html").exists()
        shutil.rmtree(folder / "report")


@pytest.mark.usefixtures("_undrawn")
def test_of_many_grids_some_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ticks=2, grids=())
    for kimg in range(1, 30):
        shutil.copy(run / "fakes_init.png", run / f"fakes{kimg:06d}.png")
    assert run_report(run, "--images=5").exit_code == 0
    images = Page((run / "report" / "report.html").read_text()).images()
    assert [name for name in images if "generated at" in name] == [
        f"run: generated at kimg {kimg}" for kimg in (0, 7, 14, 22, 29)
    ]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "other"]
    assert report.name_runs(folders) == ["a/run", "b/run", "other"]


def test_a_browser_shows_every_picture_and_the_slider_moves(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    run = make_run(tmp_path / "run", ticks=3)
    assert run_report(run).exit_code == 0
    probe = """<script>onload = () => {
      const shown = () => [...document.querySelectorAll(".frames figure")].findIndex(frame => !frame.hidden);
      const slider = document.querySelector("input"), before = shown();
      slider.value = 1;
      slider.dispatchEvent(new Event("input"));
      const widths = [...document.images].map(image => image.naturalWidth);
      document.body.dataset.found = JSON.stringify([before, shown(), Math.min(...widths), widths.length]);
    }</script></body>"""
    page = tmp_path / "probe.html"
    page.write_text((run / "report" / "report.html").read_text().replace("</body>", probe))
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom")
    command = [browser, *options, page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    found = re.search(r'data-found="([^"]*)"', dom.stdout)
    assert found
    before, after, narrowest, count = json.loads(found[1].replace("&quot;", '"'))
    assert (before, after) == (2, 1)
    assert narrowest >= 768
    assert count == len(Page(page.read_text()).images())
