"""Options shared by several commands of generate.py."""

from __future__ import annotations

from pathlib import Path

import click

from dnnlib.cli import FileOrURL, FloatList, option

PRECISIONS = ("fp32", "bf16", "fp16")  # the keys of REDUCED in training/networks/execution.py

NETWORK = option("--network", required=True, type=FileOrURL(), help="Snapshot: network-snapshot-*.pkl, or its URL.")
EMA = option(
    "--ema",
    type=float,
    metavar="LENGTH",
    help="Length of the weights' moving average relative to the run's, e.g. 0.1, rebuilt from the files network-ema-* "
    "beside the snapshot.  [default: the snapshot's G_ema]",
)
OUTDIR = option("--outdir", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
TRUNC = option(
    "--trunc", type=float, default=1.0, show_default=True, help="Truncation psi: 1 = no truncation, 0 = the average."
)
CLASS = option("--class", "class_index", type=int, help="Class label of a conditional network.")
LABEL = option("--label", type=FloatList(), help="Label of a network with vector labels, e.g. 3.0,20.0.")
BATCH = option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Batch size.")
DEVICE = option("--device", help="cpu, cuda or cuda:N.  [default: a GPU if there is one]")
DIRECTION = option(
    "--direction",
    metavar="FILE:INDEX",
    multiple=True,
    help="Edit the images along a direction in a file of `directions`, or METHOD[:STYLES]:INDEX, such as "
    "sefa:coarse:0. Can be repeated.",
)
STRENGTH = option(
    "--strength", type=float, multiple=True, help="Strength of each edit, in standard deviations of w.  [default: 1]"
)
PROJECTED = option("--projected-w", type=click.Path(path_type=Path), help="Styles from a file written by `project`.")
PRECISION = option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="Precision of activations; bf16 and fp16 are faster on a GPU and change images slightly.",
)
# Commands that analyse a model treat an image as a function of its styles, so they do not support random noise.
FIXED_NOISE = option(
    "--noise-mode",
    type=click.Choice(["const", "none"]),
    default="const",
    show_default=True,
    help="Noise of the network.",
)
POSE_OPTIONS = (
    option(
        "--translate",
        type=FloatList(),
        metavar="X,Y",
        help="Move the image to the right and down, in fractions of its size up to 0.5; for networks with Fourier "
        "features at their input: stylegan3, styleformer-a, styleformer-f.",
    ),
    option(
        "--rotate",
        type=float,
        metavar="DEGREES",
        help="Rotate the image counterclockwise, before --translate; for configuration R of stylegan3.",
    ),
)
MODEL_OPTIONS = (NETWORK, EMA, TRUNC, CLASS, LABEL, FIXED_NOISE, BATCH, PRECISION, DEVICE)
