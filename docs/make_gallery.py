"""Generate the images of the documentation from a snapshot and the run that trained it.

python docs/make_gallery.py --network=docs/shapes.pkl --run=RUN

gallery.md shows every image with the command that produces it. The commands run in a temporary folder; the images
are copied from there. Sections that the network does not support (for example attention maps without attention) are
skipped. The screenshots of the browser page require Chromium.

The figures of README.md are images/samples.png and, with --run, images/progress.png.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import click
import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import generate  # noqa: E402
from dnnlib.cli import Script  # noqa: E402
from dnnlib.config import UserError, family_of  # noqa: E402
from exploration.attention_maps import has_attention  # noqa: E402
from exploration.browser.networks import Network, Networks  # noqa: E402
from exploration.browser.player import Player  # noqa: E402
from exploration.browser.server import HOST, open_server  # noqa: E402
from exploration.directions import style_layers  # noqa: E402
from exploration.opening import build_model  # noqa: E402
from exploration.seed_images import seed_images  # noqa: E402
from exploration.style_groups import format_ranges  # noqa: E402
from reporting.progress import progress_sheet  # noqa: E402
from reporting.run_reader import Run, read_run  # noqa: E402
from torch_utils.images import save_pixels  # noqa: E402
from torch_utils.sheets import caption_of, labelled_grid, sheet, tile_of, to_rgb  # noqa: E402
from training.config import GENERATORS  # noqa: E402
from training.data_sources.codec import decode_image  # noqa: E402
from training.snapshots.snapshot import Snapshot, load_network  # noqa: E402

MAX_BYTES = 1_500_000  # total size of the images in the repository
COLUMNS = 8  # images per row of README's figures


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A section: commands without --network, and images as (output file, name on the page)."""

    title: str
    text: str
    commands: tuple[str, ...]
    images: tuple[tuple[str, str], ...]


SCREENSHOTS = {  # file -> window size, and the state of the page
    "play.png": ("1280,1000", "#seed=4&first=0&x=10&y=12"),
    "play-mixing.png": ("1280,1000", "#view=mixing&seed=2&other=6&first=0"),
    "play-morph.png": ("1280,1000", "#view=morph&from=2&to=6&frame=10&edit=0:1.5,3:-2&first=0&seed=8"),
}
BROWSER_PAGE = Entry(
    title="Browser page",
    text="Images by seed with attention of a pixel, the table of mixtures, and a morph. Each view has a link and a "
    "command.",
    commands=("play",),
    images=tuple(("", name) for name in SCREENSHOTS),
)


FILM = """## Sticking

A Styleformer and a [Styleformer-A](alias_free.md) under the same motion, after 4 kimg: details stick to the pixels of
the first, and are vertical lines in the picture of a row over time. [alias_free.md](alias_free.md#results) has the
commands.

![A plain and an alias-free network under the same motion](images/sticking.gif)
"""


def entries(G: Any) -> Iterator[Entry]:
    """Yield the sections that a network supports."""
    yield Entry(
        title="Images",
        text="Seeds 0 to 35, neither truncated nor selected.",
        commands=("--seeds=0-35 --outdir=out --grid",),
        images=(("out/grid.png", "images.png"),),
    )
    for name, styles in G.style_groups.items():
        yield Entry(
            title=f"Style mixing: {name}",
            text=f"Styles from the column: {format_ranges(styles)}. All other styles come from the row.",
            commands=(f"mix --rows=0-3 --cols=4-9 --styles={name} --outdir=out",),
            images=(("out/grid.png", f"mix-{name}.png"),),
        )
    if has_attention(G.synthesis):
        yield Entry(
            title="Attention",
            text="Attention maps of the two pixels that receive most attention (framed), in every block: on the left "
            "averaged over heads, on the right the rollout.",
            commands=("attention --seeds=0 --query=most:2 --outdir=out",),
            images=(("out/seed0000-attention.png", "attention.png"),),
        )
    methods = {"pca": "The first two principal components of w"}
    if any(style_layers(G.synthesis, G.num_ws, G.w_dim)):
        methods["sefa"] = "The first two directions of SeFa"
    for method, text in methods.items():
        yield Entry(
            title=f"Directions: {method}",
            text=f"{text}, from -3 to +3 standard deviations.",
            commands=(f"directions --method={method} --components=2 --seeds=0-2 --outdir=out",),
            images=tuple((f"out/direction0{i}.png", f"{method}{i}.png") for i in range(2)),
        )
    yield Entry(
        title="Video",
        text="Spline interpolation through four seeds, as a loop.",
        commands=("video --seeds=0-3 --interpolation=spline --frames=10 --fps=10 --output=out/morph.gif",),
        images=(("out/morph.gif", "morph.gif"),),
    )
    yield Entry(
        title="Projection",
        text="Generated images, and their projections by a pixel loss.",
        commands=(
            "--seeds=40-45 --outdir=out/targets",
            "project --target=out/targets --loss=pixels --num-steps=300 --outdir=out",
        ),
        images=(("out/pairs.png", "projection.png"),),
    )


@click.command(cls=Script)
@click.option("--network", required=True, type=click.Path(path_type=Path), help="Snapshot.")
@click.option("--run", "run_dir", type=click.Path(path_type=Path), help="Folder of the run, for progress.png.")
@click.option("--outdir", type=click.Path(path_type=Path), default=ROOT / "docs", help="Folder for gallery.md.")
def main(network: Path, run_dir: Path | None, outdir: Path) -> None:
    """Generate gallery.md, the folder gallery beside it, and the figures of README.md in the folder images."""
    network, outdir = network.resolve(), outdir.resolve()
    snapshot, browser, run = load_network(network), find_browser(), None
    if run_dir is not None:
        run = read_run(run_dir, run_dir.name)
        if not run.grids:
            raise UserError(f"--run={run_dir}: no images of a run; specify the folder with its fakes_init.png")
    shown = network.relative_to(ROOT).as_posix() if network.is_relative_to(ROOT) else network.name
    images = outdir / "gallery"
    if any(images.glob("*")) and not (outdir / "gallery.md").is_file():
        raise UserError(f"{images}: the folder exists without a gallery.md beside it; give another --outdir")
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder, "gallery")
        new.mkdir()
        for entry in entries(snapshot.G_ema):
            make_images(entry, network, new)
        save_screenshots(shown, snapshot, browser, new)
        shutil.rmtree(images, ignore_errors=True)
        shutil.copytree(new, images)
    (outdir / "gallery.md").write_text(page(snapshot, shown))
    (outdir / "images").mkdir(exist_ok=True)
    save_pixels(samples(snapshot), outdir / "images" / "samples.png")
    if run is not None:
        save_pixels(progress(run, snapshot.G_ema.img_shape[1:]), outdir / "images" / "progress.png")
    click.echo(f"{len(list(images.iterdir()))} images in {images}")


def make_images(entry: Entry, network: Path, target: Path) -> None:
    """Run a section's commands and copy its images to a folder."""
    with tempfile.TemporaryDirectory() as folder:
        run_all(entry.commands, network, Path(folder))
        for file, name in entry.images:
            shutil.copy(Path(folder) / file, target / name)


def run_all(commands: tuple[str, ...], network: Path, folder: Path) -> None:
    """Run commands of generate.py, which write to `out`, in a folder; then pair projections with their targets."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        for command in commands:
            click.echo(f"generate.py {command}")
            generate.main(with_network(command, str(network)), standalone_mode=False)
        if (folder / "out" / "targets").exists():
            pair_up(folder / "out")
    finally:
        os.chdir(before)


def with_network(command: str, network: str) -> list[str]:
    """Return the arguments of a command, with --network after its name."""
    words = shlex.split(command)
    position = 0 if words[0].startswith("-") else 1
    return [*words[:position], f"--network={network}", *words[position:]]


def pair_up(folder: Path) -> None:
    """Write pairs.png: the targets in a row, their projections below."""
    rows = [sorted((folder / "targets").glob("*.png")), sorted(folder.glob("proj*.png"))]
    tiles = [[tile_of(to_rgb(decode_image(path.read_bytes()))) for path in row] for row in rows]
    captions = [caption_of(path.stem) for path in rows[0]]
    save_pixels(sheet(tiles, captions, ["target", "projection"]), folder / "pairs.png")


def find_browser() -> str:
    """Return the path of Chromium. Raises UserError if it is not installed."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path:
            return path
    raise UserError("the screenshots of the browser page require Chromium; install it, for example as chromium")


def save_screenshots(shown: str, snapshot: Snapshot, browser: str, folder: Path) -> None:
    """Write the screenshots of the browser page; `shown` is the path of the network in its commands."""
    cpu, c = torch.device("cpu"), torch.zeros(1, snapshot.G_ema.c_dim)
    model = build_model(snapshot, cpu, c, noise_mode="const", batch=24, precision="fp32", trunc=1.0)
    family = family_of(snapshot.config.generator, GENERATORS)
    opened = Network(path=shown, family=family, model=model, kimg=snapshot.kimg)
    server = open_server(Player(Networks(lambda: {snapshot.path.name: lambda: opened})), port=0)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        for name, (size, address) in SCREENSHOTS.items():
            take_screenshot(browser, f"http://{HOST}:{server.server_port}/{address}", size, folder / name)
    finally:
        server.shutdown()
        server.server_close()


def take_screenshot(browser: str, url: str, size: str, target: Path) -> None:
    """Write a screenshot of a page of a size. Raises UserError if Chromium fails."""
    flags = ("--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=20000", f"--window-size={size}")
    try:
        done = subprocess.run(
            [browser, *flags, f"--screenshot={target}", url], capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{browser} did not finish in {error.timeout:g} s") from None
    if not target.is_file():
        raise UserError(f"{browser} wrote no screenshot: {done.stderr[-500:]}")


def samples(snapshot: Snapshot) -> np.ndarray:
    """Draw images of the first seeds, enlarged and labelled."""
    G = snapshot.G_ema
    with torch.no_grad():
        made = seed_images(G, tuple(range(4 * COLUMNS)), torch.zeros(1, G.c_dim))
    return labelled_grid(made, [f"seed {seed}" for seed in range(len(made))], COLUMNS)


def progress(run: Run, img_size: tuple[int, int]) -> np.ndarray:
    """Draw images at the start, at 1/32, 1/16, ... 1/2 of the run, and at its end."""
    kimg = np.array([grid.kimg for grid in run.grids])
    targets = [0.0, *(kimg.max() / 2**k for k in range(5, -1, -1))]
    chosen = [kimg[np.abs(kimg - target).argmin()] for target in targets]
    return progress_sheet(run, img_size, columns=COLUMNS, metric="swd500", kimg=chosen)


def page(snapshot: Snapshot, shown: str) -> str:
    """Return the page; `shown` is the path of the network in the commands."""
    sections = [*entries(snapshot.G_ema), BROWSER_PAGE]
    return "\n".join([head(snapshot, shown), *(section(entry, shown) for entry in sections), FILM])


def head(snapshot: Snapshot, shown: str) -> str:
    """Return the title and the introduction of the page."""
    config = snapshot.config
    family = type(config.generator).__name__.removesuffix("Config")
    height, width = snapshot.G_ema.img_shape[1:]
    return (
        "# Gallery\n\n"
        f"*Generated by `python docs/make_gallery.py --network={shown}`.*\n\n"
        f"Output of the commands of [exploring.md](exploring.md) for a {family} with images of {width}x{height}\n"
        f"pixels, trained for {snapshot.kimg:g} kimg.\n"
    )


def section(entry: Entry, shown: str) -> str:
    """Return a heading, the full commands, and the images."""
    commands = "".join(
        f"    python generate.py {shlex.join(with_network(command, shown))}\n" for command in entry.commands
    )
    images = "\n".join(f"![{entry.title}](gallery/{name})\n" for _, name in entry.images)
    return f"## {entry.title}\n\n{entry.text}\n\n{commands}\n{images}"


if __name__ == "__main__":
    main()
