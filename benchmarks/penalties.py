"""Time D's step with exact and estimated penalties (R1 and R2 of --loss=relativistic), and measure the estimate's bias.

\b
none      no penalty (--gamma=0)
exact     from second derivatives
estimate  finite differences on all images (loss.penalty=estimate)
quarter   finite differences on a quarter of the images (loss.penalty_share=0.25)

Each discriminator prints a line of JSON with the times. The variants alternate, and each time is a median: CPU seconds
of this process on a CPU, so that other programs matter less, elapsed seconds on a GPU. A step includes the generation
of images, by a small generator, and the optimizer.

Then each precision and sigma prints the ratio of the estimate to the exact penalty, and of their gradients with respect
to D's parameters, at initialization and after --train-steps steps, averaged over --draws perturbations. The reference
is <gradient, n>^2 for the same perturbations n in float32; its expectation is the exact penalty.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch
from common import emit, synchronize
from torch import Tensor
from train_step import with_synthetic_images

from dnnlib.cli import FloatList, NameList, Script, option
from dnnlib.config import UserError, override
from torch_utils import distributed
from torch_utils.misc import seed_step
from training.config import PRESETS, Environment, TrainConfig, apply_options, resolve
from training.dataset import ImageDataset
from training.networks import execution
from training.penalties import Estimate, squared_differences
from training.training_loop import Trainer, set_arithmetic

# Discriminators for images of 32x32 without minibatch-std, as options of the preset cifar.
DISCRIMINATORS: dict[str, dict[str, Any]] = {
    "stylegan2": {"discriminator.channel_base": 1024, "discriminator.channel_max": 64},
    "stylegan2-readme": {},
    "styleformer": {
        "discriminator.family": "styleformer",
        "discriminator.channel_base": 1024,
        "discriminator.channel_max": 64,
        "discriminator.depth": 16,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"loss.r1_gamma": 0.0},
    "exact": {},
    "estimate": {"loss.penalty": "estimate"},
    "quarter": {"loss.penalty": "estimate", "loss.penalty_share": 0.25},
}


@click.command(cls=Script, help=__doc__)
@option("--discriminators", type=NameList(), default=",".join(DISCRIMINATORS), show_default=True,
        help="Discriminators to measure.")  # fmt: skip
@option("--data", type=click.Path(exists=True), help="Images of 32x32 pixels. [synthetic scenes]")
@option("--batch", type=click.IntRange(min=4), default=8, show_default=True, help="Images per step.")
@option("--device", help="cpu, cuda or cuda:N. [a GPU if there is one]")
@option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="CPU threads.")
@option("--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Timed steps of each variant.")
@option("--precisions", type=NameList(), default="fp32,bf16,fp16", show_default=True,
        help="Precisions of the bias; `none`: no bias.")  # fmt: skip
@option("--sigmas", type=FloatList(), default="0.001,0.01,0.02,0.05,0.1", show_default=True, help="Sigmas of the bias.")
@option("--draws", type=click.IntRange(min=2), default=8, show_default=True, help="Perturbations for the bias.")
@option("--train-steps", type=click.IntRange(min=1), default=50, show_default=True, help="Steps between the biases.")
def main(
    discriminators: tuple[str, ...],
    data: str | None,
    batch: int,
    device: str | None,
    threads: int,
    rounds: int,
    precisions: tuple[str, ...],
    sigmas: tuple[float, ...],
    draws: int,
    train_steps: int,
) -> None:
    for name in discriminators:
        if name not in DISCRIMINATORS:
            raise UserError(f"--discriminators: {name!r} is not one of {', '.join(DISCRIMINATORS)}")
    where = distributed.choose_device(device)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        base = override(PRESETS["tiny"], {"generator.widths": (64, 32, 16)})
        base, env = with_synthetic_images(base, 32, Path(folder), on_gpu=where.type == "cuda")
        base = override(base, {"data.path": data} if data else {})
        for name in discriminators:
            found = {variant: new_trainer(base, env, where, batch, name, variant) for variant in VARIANTS}
            labels = {"discriminator": name, "batch": batch, "parameters": num_parameters(found["exact"])}
            emit({"benchmark": "penalties", **labels, **times(found, rounds)}, where)
            if precisions == ("none",):
                continue
            for row in biases(found["exact"], precisions, sigmas, draws, train_steps):
                emit({"benchmark": "penalty_bias", **labels, **row}, where)


def new_trainer(
    base: TrainConfig, env: Environment, device: torch.device, batch: int, discriminator: str, variant: str
) -> Trainer:
    """Return a trainer of --loss=relativistic with a small generator, without augmentation."""
    options = {
        "augment.mode": "noaug",
        "loss.objective": "relativistic",
        "loss.r1_gamma": 0.05,
        "batch_size": batch,
        "precision": "fp32",
        "run.device": str(device),
        "run.graphs": False,
        **VARIANTS[variant],
    }
    D = apply_options(PRESETS["cifar"], {"discriminator.mbstd_group_size": 0, **DISCRIMINATORS[discriminator]})
    config = resolve(apply_options(base, {**options, "discriminator": D.discriminator}), env)
    set_arithmetic(config)
    return Trainer(config, ImageDataset(config.data), device)


def num_parameters(trainer: Trainer) -> int:
    """Return the number of D's parameters."""
    return sum(p.numel() for p in trainer.D.parameters())


def times(trainers: dict[str, Trainer], rounds: int) -> dict[str, Any]:
    """Return the median seconds of D's step for each variant, and their ratios to a step without penalty."""
    clock = time.perf_counter if trainers["none"].device.type == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {variant: [] for variant in trainers}
    reals = next(trainers["none"]._batches())
    for round in range(rounds + 1):
        for variant, trainer in trainers.items():
            phase = next(phase for phase in trainer.phases if phase.name == "D_main")
            synchronize(trainer.device)
            began = clock()
            trainer.run_phase(phase, *reals)
            synchronize(trainer.device)
            if round:  # the first round allocates Adam's moments
                seconds[variant].append(clock() - began)
    medians = {variant: statistics.median(values) for variant, values in seconds.items()}
    return {
        "seconds": {variant: round_to(value) for variant, value in medians.items()},
        "ratio": {variant: round_to(value / medians["none"]) for variant, value in medians.items()},
        "rounds": rounds,
    }


def biases(
    trainer: Trainer, precisions: tuple[str, ...], sigmas: tuple[float, ...], draws: int, train_steps: int
) -> Iterator[dict[str, Any]]:
    """Yield the estimate divided by the exact penalty for real images, at initialization and after training."""
    seed_step(0, "weights", 0)
    trainer.D.load_state_dict(trainer.config.discriminator.build().state_dict())
    data = trainer._batches()
    for steps in (0, train_steps):
        for _ in range(steps):
            reals = next(data)
            for phase in trainer.phases:
                trainer.run_phase(phase, *reals)
        img, c = next(data)
        for precision, sigma in product(precisions, sigmas):
            rows = [compare(trainer, img, c, precision, sigma, seed) for seed in range(draws)]
            yield (
                {"steps": steps, "precision": precision, "sigma": sigma, "draws": draws}
                | {name: round_to(statistics.mean(row[name] for row in rows)) for name in rows[0]}
                | {
                    f"{name}_standard_error": round_to(statistics.stdev(row[name] for row in rows) / draws**0.5)
                    for name in ("ratio", "gradient_ratio")
                }
            )


def compare(trainer: Trainer, img: Tensor, c: Tensor, precision: str, sigma: float, seed: int) -> dict[str, float]:
    """Compare the mean squared difference E for one perturbation n with the mean P of <gradient, n>^2 in float32.

    `ratio` is E / P. With the gradients e and p of E and P with respect to D's parameters, `gradient_ratio` is
    <e, p> / |p|^2, and `gradient_error` is |e - p| / |p|.
    """
    parameters = trainer.d_updater.parameters
    with trainer.d_updater.requiring_grad():
        torch.manual_seed(seed)
        noise, x = torch.randn_like(img), img.clone().requires_grad_(True)
        with execution.using(twice_differentiable=True):
            (gradient,) = torch.autograd.grad(trainer.D(x, c).sum(), x, create_graph=True)
            exact = (gradient * noise).sum(dim=(1, 2, 3)).square().mean()
            p = flat(torch.autograd.grad(exact, parameters, materialize_grads=True))
        torch.manual_seed(seed)
        with execution.using(reduced=execution.REDUCED[precision]):
            _, (squared,) = squared_differences(trainer.gan, img, c, [], estimate=Estimate(share=1.0, sigma=sigma))
            e = flat(torch.autograd.grad(squared.mean(), parameters, materialize_grads=True))
    return {
        "exact": exact.item(),
        "ratio": (squared.mean() / exact).item(),
        "gradient_ratio": (e @ p / (p @ p)).item(),
        "gradient_error": ((e - p).norm() / p.norm()).item(),
    }


def flat(gradients: Sequence[Tensor]) -> Tensor:
    """Return gradients in one vector, in float64."""
    return torch.cat([x.flatten() for x in gradients]).double()


def round_to(x: float) -> float:
    """Round to four significant digits."""
    return float(f"{x:.4g}")


if __name__ == "__main__":
    main()
