"""Build a training dataset from images, archives or published datasets; check an existing dataset.

python dataset_tool.py --source=cifar-10-python.tar.gz --dest=data/cifar10.zip
python dataset_tool.py check data/cifar10.zip
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from PIL import Image
from tqdm import tqdm

from dnnlib.allocator import tune_allocator
from dnnlib.cli import DefaultGroup, IntOrAuto, Script, option
from dnnlib.config import UserError
from dnnlib.screen import printable
from dnnlib.util import counted, write_atomically
from training.data_sources.build import Problems, convert_all, listed, new_dataset, probe, refuse_dest
from training.data_sources.checking import describe_findings, find_problems, find_remarks, inspect_all
from training.data_sources.classes import Classes, choose_classes, describe_classes, note_on_folders
from training.data_sources.codec import SLOW_DECODER
from training.data_sources.convert import RESIZE_FILTERS, TRANSFORMS, Conversion, is_all_gray
from training.data_sources.dataset_json import Label
from training.data_sources.files import open_store, read_dataset_json
from training.data_sources.listing import LeftOut, count_left_out, describe_left_out
from training.data_sources.parallel import ended_by_signals
from training.data_sources.sheet import make_sheet
from training.data_sources.sizes import by_short_side, describe_sizes, size_options
from training.data_sources.sources import SUPPORTED, Drawing, FolderLevel, Source, items_of, open_source

FORMAT_VERSION = 1

_SHAPES_SIZE = 32
_SHAPES_COUNT = 4096
_MAX_PAD = 1024


@click.group(cls=DefaultGroup, default="build")
@click.pass_context
def main(context: click.Context) -> None:
    """Build or check a dataset."""
    tune_allocator()
    context.with_resource(ended_by_signals())


@main.command(
    cls=Script,
    help=f"""Build a training dataset from SOURCE.

    SOURCE is {SUPPORTED}. The result is a .zip file, or a folder if DEST does not end in .zip. It holds uncompressed
    PNG images of equal size and a dataset.json with labels, class names and the build settings.

    Skipped files and the classes are printed before anything is written. If images cannot be used, all of them are
    listed and nothing is written.

    `dataset_tool.py check PATH` verifies an existing dataset and lists all problems.""",
)
@option("--source", metavar="PATH", required=True, help="Images to read, see above")
@option("--dest", metavar="PATH", required=True, type=click.Path(path_type=Path), help=".zip file or folder to write")
@option("--width", type=click.IntRange(min=1), help="Output width in pixels [default: unchanged; 32 for shapes]")
@option("--height", type=click.IntRange(min=1), help="Output height in pixels [default: unchanged; 32 for shapes]")
@option("--resolution", metavar="WxH", help="Output width and height, such as 256x256")
@option(
    "--transform",
    type=click.Choice(TRANSFORMS),
    help="center-crop: crop to the aspect ratio width:height, then resize; center-crop-wide: as in StyleGAN2-ADA for "
    "LSUN Car, padded with black to a square of side width; center-crop-letterbox: center-crop, then likewise padded "
    "[default: resize only]",
)
@option(
    "--pad",
    type=click.IntRange(min=0, max=_MAX_PAD),
    help="Pad each side with this many black pixels before the transform [default: 2 for MNIST, else 0]",
)
@option(
    "--resize-filter",
    type=click.Choice(list(RESIZE_FILTERS)),
    default="lanczos",
    show_default=True,
    help="Resampling filter; published results for FFHQ at 256x256 require box",
)
@option(
    "--channels",
    type=click.Choice(["auto", "1", "3", "4"]),
    default="auto",
    show_default=True,
    help="1: grayscale; 3: RGB, transparent images composited over white; 4: RGBA; auto: grayscale if all images are, "
    "else RGB",
)
@option("--max-images", type=click.IntRange(min=1), help="Use the first N images [default: all; 4096 for shapes]")
@option(
    "--labels-from-folders",
    is_flag=False,
    flag_value="auto",
    type=IntOrAuto(minimum=1),
    metavar="[LEVEL]",
    help="Use folders as classes: the top-level folders, or the folders inside a single enclosing folder or inside "
    "train/ and val/; with LEVEL, the folders at that level (1: top)",
)
@option("--split", metavar="NAME", help="Split of a dataset of tables or shards, or all [default: train]")
@option(
    "--skip-bad",
    is_flag=True,
    help="Skip and list images that cannot be decoded; ignore missing tables and shards",
)
@option("-v", "--verbose", is_flag=True, help="List all skipped files by name")
@option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed of --source=shapes")
@option("--workers", type=click.IntRange(min=1), help="Number of processes [default: one per core]")
def build(
    source: str,
    dest: Path,
    width: int | None,
    height: int | None,
    resolution: str | None,
    transform: str | None,
    pad: int | None,
    resize_filter: str,
    channels: str,
    max_images: int | None,
    labels_from_folders: FolderLevel | None,
    split: str | None,
    skip_bad: bool,
    verbose: bool,
    seed: int,
    workers: int | None,
) -> None:
    if resolution is not None:
        width, height = read_resolution(resolution, width, height)
    conversion = Conversion(width=width, height=height, transform=transform, resize_filter=resize_filter)
    refuse_dest(dest, source)
    drawing = Drawing(seed, max_images or _SHAPES_COUNT, width or _SHAPES_SIZE, height or _SHAPES_SIZE)
    images = open_source(
        source, labels_from_folders=labels_from_folders, drawing=drawing, split=split, skip_missing=skip_bad
    )
    num_images = min(len(images), max_images or len(images))
    classes = choose_classes(images.labels, images.class_names)
    describe_source(images, num_images, classes, verbose=verbose)

    conversion = replace(
        conversion,
        pad=images.pad if pad is None else pad,
        channels=choose_channels(images, num_images) if channels == "auto" else int(channels),
    )
    shape = probe(islice(images, num_images), conversion) or (1, 1, conversion.channels)
    problems = Problems(skip_bad)
    labels: list[list[str | Label | None]] = []
    with new_dataset(dest) as write:
        progress = tqdm(islice(images, num_images), total=num_images, unit="images", disable=None)
        converted = convert_all(progress, conversion, shape, workers or os.cpu_count() or 1)
        for position, (item, result) in enumerate(converted):
            png = problems.note(item, result)
            if png is not None and not problems.stop_the_build:
                name = f"{len(labels) // 1000:05d}/img{len(labels):08d}.png"
                write(name, png)
                labels.append([name, classes.labels[position] if classes.labels else None])
        check_problems(problems, images, conversion, shape, verbose=verbose)
        write("dataset.json", json.dumps(describe(images, conversion, shape, labels, classes, problems)).encode())
    H, W, C = shape
    labelled = "with labels" if classes.labels else "without labels"
    click.echo(f"{dest}: {counted(len(labels), 'image')} of {W}x{H} pixels and {C} channels, {labelled}")
    report_changes(conversion, problems, verbose=verbose)


def read_resolution(text: str, *others: int | None) -> tuple[int, int]:
    """Parse e.g. 256x128 to (width, height). Raises UserError, also if `others` (--width, --height) are set."""
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text, re.ASCII)
    if not match:
        raise UserError(f"--resolution={text}: give width and height in pixels, such as 256x256")
    if any(others):
        raise UserError(f"--resolution={text}: give either --resolution or --width and --height")
    return int(match[1]), int(match[2])


def choose_channels(source: Source, num_images: int) -> int:
    """Return the number of channels: the source's if known, else 1 if all image headers are grayscale, else 3."""
    if source.channels is not None:
        return source.channels
    headers = tqdm(islice(source, num_images), total=num_images, unit="headers", disable=None, delay=1, leave=False)
    return 1 if is_all_gray(headers) else 3


def describe_source(source: Source, num_images: int, classes: Classes, *, verbose: bool) -> None:
    """Print the source, notes, classes and skipped files, before anything is written."""
    click.echo(f"{printable(source.name)}: {counted(num_images, 'image')}")
    for note in (*source.notes, *classes.notes):
        click.echo(f"Note: {printable(note)}")
    if classes.labels:
        click.echo(describe_classes(classes.labels[:num_images], classes.names))
    show_skipped(source.left_out, verbose=verbose)


def show_skipped(left_out: LeftOut, *, verbose: bool) -> None:
    """Print the files that are not images, by kind."""
    if left_out:
        click.echo(f"Skipped {counted(count_left_out(left_out), 'file')}:")
        for line in describe_left_out(left_out, verbose=verbose):
            click.echo(line)


def check_problems(
    problems: Problems, source: Source, conversion: Conversion, shape: tuple[int, int, int], *, verbose: bool
) -> None:
    """Raise UserError if unusable images prevent the build; the message lists them and a command that works."""
    if problems.num_small == problems.total:
        raise UserError(
            f"--width={conversion.width} --height={conversion.height}: --transform=center-crop-wide skips smaller "
            f"images, and all {problems.total} images of {source.name} are smaller: choose a smaller size"
        )
    lines, options = [], []
    all_broken = len(problems.broken) == problems.total
    if problems.broken and (all_broken or not problems.skip_bad):
        lines.append(f"{counted(len(problems.broken), 'image')} that cannot be read:")
        lines += listed(problems.broken, verbose=verbose)
        options.append("--skip-bad")
    if problems.other_size:
        images = counted(len(problems.other_size), "image")
        lines.append(f"{images} of another size than the first, {shape[1]}x{shape[0]}:")
        lines += listed(problems.other_size, verbose=verbose)
        options += size_options(problems.sizes)
    if lines:
        head = f"{source.name}: nothing was written, because of"
        end = "None can be read: check the source" if all_broken else f"To continue:\n  {rerun_command(*options)}"
        raise UserError("\n".join([head, *lines, end]))


def rerun_command(*added: str) -> str:
    """Return the current command line with additional options."""
    context = click.get_current_context()
    words = []
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if context.get_parameter_source(parameter.name or "") == ParameterSource.COMMANDLINE:
            flag = max(parameter.opts, key=lambda flag: (len(flag), flag.count("-")))
            is_bare = value is True or value == getattr(parameter, "flag_value", None)
            words.append(flag if is_bare else f"{flag}={value}")
    return f"python dataset_tool.py {shlex.join([*words, *added])}"


def describe(
    source: Source,
    conversion: Conversion,
    shape: tuple[int, int, int],
    labels: list[list[Any]],
    classes: Classes,
    problems: Problems,
) -> dict[str, Any]:
    """Return the content of dataset.json."""
    H, W, C = shape
    return {
        "labels": labels if classes.labels else None,
        "class_names": classes.names,
        "source": source.name,
        "num_images": len(labels),
        "width": W,
        "height": H,
        "channels": C,
        "pad": conversion.pad,
        "transform": conversion.transform,
        "resize_filter": conversion.resize_filter if conversion.width else None,
        "short_sides": by_short_side(problems.sizes),
        "format_version": FORMAT_VERSION,
    }


def report_changes(conversion: Conversion, problems: Problems, *, verbose: bool) -> None:
    """Print how the images of the dataset differ from the source: resized and skipped images."""
    if conversion.width and conversion.height:
        small = problems.num_smaller_than(conversion.width, conversion.height)
        enlarged = f"; {counted(small, 'image')} enlarged" if small else ""
        click.echo(f"Originals: {describe_sizes(problems.sizes)}{enlarged}")
    if problems.num_small:
        click.echo(
            f"{problems.num_small} images are smaller than {conversion.width}x{conversion.height} and were skipped "
            f"({conversion.transform})"
        )
    if problems.broken:
        click.echo(f"Skipped {counted(len(problems.broken), 'image')} that cannot be read:")
        for line in listed(problems.broken, verbose=verbose):
            click.echo(line)


@main.command(cls=Script)
@click.argument("path", type=click.Path(path_type=Path))
@option("--sheet", metavar="FILE.png", type=click.Path(path_type=Path), help="Write a contact sheet of 64 images")
@option("-v", "--verbose", is_flag=True, help="List all images instead of the first ten per problem")
@option("--workers", type=click.IntRange(min=1), help="Number of processes [default: one per core]")
def check(path: Path, sheet: Path | None, verbose: bool, workers: int | None) -> None:
    """Verify every image of a dataset and list all problems; exit code 1 if there are any.

    Duplicates, uniform and nearly black images, classes and sizes are also listed but are not problems.
    """
    if sheet:
        check_sheet(sheet, path)
    store = open_store(path)
    content = read_dataset_json(store)
    folders = None if store.json_name else note_on_folders(store.names)
    for note in filter(None, [*store.notes, *content.notes, folders]):
        click.echo(f"Note: {printable(note)}")
    show_skipped(store.left_out, verbose=verbose)
    if SLOW_DECODER:
        click.echo(SLOW_DECODER, err=True)
    items = tqdm(items_of(store), total=len(store.names), unit="images", disable=None)
    findings = inspect_all(store.names, items, workers or os.cpu_count() or 1)

    problems = find_problems(findings, content)
    for heading, lines in [*problems.items(), *find_remarks(findings, content, verbose=verbose).items()]:
        click.echo("\n".join([heading, *listed(lines, verbose=verbose)]))
    for line in describe_findings(findings, content):
        click.echo(line)
    if sheet:
        write_sheet(sheet, make_sheet(store, content, findings))
        click.echo(f"Written: {sheet}")
    if problems:
        raise SystemExit(1)
    ((H, W, C),) = findings.shapes
    labelled = "without labels" if content.labels is None else "with labels"
    click.echo(f"{path}: {counted(len(store.names), 'image')} of {W}x{H} pixels and {C} channels, {labelled}")


def check_sheet(sheet: Path, path: Path) -> None:
    if sheet.suffix.lower() != ".png":
        raise UserError(f"--sheet={sheet}: must be the name of a .png file")
    if sheet.exists():
        raise UserError(f"--sheet={sheet} exists: remove it or choose another name")
    if sheet.resolve().is_relative_to(path.resolve()):
        raise UserError(f"--sheet={sheet} is inside {path} and would become part of the dataset: choose another folder")


def write_sheet(sheet: Path, image: Image.Image) -> None:
    content = io.BytesIO()
    image.save(content, "png")
    try:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(sheet, content.getvalue())
    except OSError as error:
        raise UserError(f"--sheet={sheet} cannot be written ({error.strerror}): choose another folder") from error


if __name__ == "__main__":
    main()
