"""Make docs/gallery.md and its pictures from a snapshot: every picture with the command that makes it.

python docs/make_gallery.py --network=docs/shapes.pkl

The commands run in a temporary folder; what a page shows is copied from there and made smaller. What the network cannot
do (attention maps without attention, say) is left out.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import generate  # noqa: E402
from dnnlib.cli import Script  # noqa: E402
from dnnlib.config import UserError  # noqa: E402
from dnnlib.images import open_image  # noqa: E402
from exploration.attention_maps import has_attention  # noqa: E402
from exploration.directions import style_layers  # noqa: E402
from exploration.mixing import format_ranges  # noqa: E402
from exploration.sheets import enlarged, sheet, to_rgb  # noqa: E402
from training.data_sources.codec import decode_image  # noqa: E402
from training.snapshots.snapshot import Snapshot, load_network  # noqa: E402

WIDTH = 780  # pixels of a picture on the page, at most; small ones are enlarged as far as that goes
MAX_BYTES = 1_500_000  # of all pictures


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A section: commands without the network, and the pictures of theirs that are shown, (file, name on the page)."""

    title: str
    text: str
    commands: tuple[str, ...]
    pictures: tuple[tuple[str, str], ...]


def entries(G: Any) -> Iterator[Entry]:
    """The sections that a network can fill."""
    yield Entry(
        title="Images",
        text="Seeds 0 to 35, with a little truncation.",
        commands=("--seeds=0-35 --trunc=0.8 --outdir=out --grid",),
        pictures=(("out/grid.png", "images.png"),),
    )
    for name, styles in G.style_groups.items():
        yield Entry(
            title=f"Style mixing: {name}",
            text=f"Each image has the styles {format_ranges(styles)} of its column and the others of its row.",
            commands=(f"mix --rows=0-3 --cols=4-9 --styles={name} --outdir=out",),
            pictures=(("out/grid.png", f"mix-{name}.png"),),
        )
    if has_attention(G.synthesis):
        yield Entry(
            title="Attention",
            text="What the two pixels that receive most attention (framed) attend to: for each, the maps of every "
            "block, averaged over heads, and below them the rollout.",
            commands=("attention --seeds=0 --query=most:2 --outdir=out",),
            pictures=(("out/seed0000-attention.png", "attention.png"),),
        )
    methods = {"pca": "The first two principal components of w"}
    if any(style_layers(G.synthesis, G.num_ws, G.w_dim)):
        methods["sefa"] = "The first two of SeFa"
    for method, text in methods.items():
        yield Entry(
            title=f"Directions: {method}",
            text=f"{text}, from -3 to +3 standard deviations.",
            commands=(f"directions --method={method} --components=2 --seeds=0-2 --outdir=out",),
            pictures=tuple((f"out/direction0{i}.png", f"{method}{i}.png") for i in range(2)),
        )
    yield Entry(
        title="Video",
        text="Along a spline through four seeds, and back.",
        commands=("video --seeds=0-3 --interpolation=spline --frames=8 --fps=10 --output=out/morph.gif",),
        pictures=(("out/morph.gif", "morph.gif"),),
    )
    yield Entry(
        title="Projection",
        text="Top: images of the generator. Bottom: their projections, found from the pixels alone.",
        commands=(
            "--seeds=40-45 --outdir=out/targets",
            "project --target=out/targets --loss=pixels --num-steps=300 --outdir=out",
        ),
        pictures=(("out/pairs.png", "projection.png"),),
    )


@click.command(cls=Script)
@click.option("--network", required=True, type=click.Path(path_type=Path), help="Snapshot.")
@click.option("--outdir", type=click.Path(path_type=Path), default=ROOT / "docs", help="Folder for gallery.md.")
def main(network: Path, outdir: Path) -> None:
    """Make gallery.md and the folder gallery beside it."""
    network, outdir = network.resolve(), outdir.resolve()
    snapshot = load_network(network)
    shown = network.relative_to(ROOT).as_posix() if network.is_relative_to(ROOT) else network.name
    pictures = outdir / "gallery"
    if any(pictures.glob("*")) and not (outdir / "gallery.md").is_file():
        raise UserError(f"{pictures}: is there, without a gallery.md beside it; give another --outdir")
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder, "gallery")
        new.mkdir()
        for entry in entries(snapshot.G_ema):
            make_pictures(entry, network, new)
        shutil.rmtree(pictures, ignore_errors=True)
        shutil.copytree(new, pictures)
    (outdir / "gallery.md").write_text(page(snapshot, shown))
    size = sum(path.stat().st_size for path in pictures.iterdir())
    click.echo(f"{len(list(pictures.iterdir()))} pictures, {size} bytes, in {pictures}")
    if size > MAX_BYTES:
        raise UserError(f"{pictures}: {size} bytes are more than {MAX_BYTES}: show fewer or smaller pictures")


def make_pictures(entry: Entry, network: Path, target: Path) -> None:
    """Run a section's commands and put its pictures into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        run_all(entry.commands, network, Path(folder))
        for file, name in entry.pictures:
            shrink(Path(folder) / file, target / name)


def run_all(commands: tuple[str, ...], network: Path, folder: Path) -> None:
    """Run commands of generate.py in a folder, where `out` is theirs."""
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
    """The arguments, with --network after the name of the command."""
    words = shlex.split(command)
    place = 0 if words[0].startswith("-") else 1
    return [*words[:place], f"--network={network}", *words[place:]]


def pair_up(folder: Path) -> None:
    """Write pairs.png: the targets in a row, their projections below."""
    rows = [sorted((folder / "targets").glob("*.png")), sorted(folder.glob("proj*.png"))]
    tiles = [[enlarged(to_rgb(decode_image(path.read_bytes()))) for path in row] for row in rows]
    Image.fromarray(sheet(tiles)).save(folder / "pairs.png")


def shrink(source: Path, target: Path) -> None:
    """Copy a picture, no wider than WIDTH and not much narrower, in 256 colours."""
    if source.suffix == ".gif":
        shutil.copy(source, target)
        return
    with open_image(source.read_bytes()) as image:
        picture = image.convert("RGB")
    if picture.width > WIDTH:
        picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
    factor = WIDTH // picture.width
    picture = picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
    picture.quantize(dither=Image.Dither.NONE).save(target, optimize=True)


def page(snapshot: Snapshot, shown: str) -> str:
    """The whole page, `shown` being what stands for the network in the commands."""
    return "\n".join([head(snapshot, shown), *(section(entry, shown) for entry in entries(snapshot.G_ema))])


def head(snapshot: Snapshot, shown: str) -> str:
    """The beginning of the page."""
    config = snapshot.config
    family = type(config.generator).__name__.removesuffix("Config")
    height, width = snapshot.G_ema.img_shape[1:]
    return (
        "# Gallery\n\n"
        f"*Written by `python docs/make_gallery.py --network={shown}`.*\n\n"
        f"A {family} for images of {width}x{height} pixels after {snapshot.kimg:g} thousand images, and what the\n"
        "commands of [exploring.md](exploring.md) show.\n"
    )


def section(entry: Entry, shown: str) -> str:
    """A heading, the commands as a user types them, and the pictures."""
    commands = "".join(f"    python generate.py {shlex.join(with_network(one, shown))}\n" for one in entry.commands)
    pictures = "\n".join(f"![{entry.title}](gallery/{name})\n" for _, name in entry.pictures)
    return f"## {entry.title}\n\n{entry.text}\n\n{commands}\n{pictures}"


if __name__ == "__main__":
    main()
