"""Train a GAN: options -> TrainConfig -> Trainer on one or several processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import click
import torch

import dnnlib.cli
import legacy
import metrics.registry
from dnnlib.cli import Choice, IntList, IntOrAuto, NameList, Size, option, switch
from dnnlib.config import ConfigError, override, to_json
from dnnlib.download import is_url
from metrics.detectors import read_detectors
from torch_utils import distributed
from torch_utils.misc import count_parameters
from training import runs
from training.augment.diffaugment import DEFAULT_POLICY, DIFFAUG
from training.augment.pipe import Mode
from training.config import (
    PRESETS,
    TRANSFER_LEARNING,
    Circumstances,
    RunConfig,
    TrainConfig,
    customise,
    fitting_size,
    resolve,
)
from training.dataset import ImageDataset, allow_open_files
from training.loggers import choose_loggers
from training.loss import Objective
from training.networks import DISCRIMINATORS, GENERATORS
from training.networks.grid_attention import Form
from training.networks.styleformer import LayerNormPlace
from training.networks.vit import Norm, Position
from training.worker import train_worker

# fmt: off
OPTIONS = (
    # Where and what
    option("--outdir", field=None, metavar="DIR", help="Folder in which the run gets a numbered folder of its own."),
    option("--data", field="data.path", metavar="PATH", help="Training images: zip or folder made by dataset_tool.py."),
    option("--cfg", field=None, type=click.Choice(list(PRESETS)), default="auto", show_default=True, help="Preset."),
    option("--gpus", field="run.num_gpus", type=int, metavar="INT", help="Processes on this machine, one per GPU. [1]"),
    option("--device", field="run.device", metavar="NAME", help="cpu, cuda or cuda:N. [a GPU if there is one]"),
    option("--resume", field=None, metavar="latest|DIR|PT|PKL|URL",
           help="Go on with the newest run of this configuration in --outdir, or with the run in a folder; or start a "
                "new run from a training state, or from the weights of a snapshot (transfer learning)."),
    switch("--override", field=None, help="Go on with a run although options differ from those it was started with."),
    option("--desc", field="run.desc", metavar="WORD", help="A word at the end of the name of the run's folder."),
    option("--seed", field="seed", type=int, metavar="INT", help="Seed of weights, latents, data order, noise. [0]"),
    option("-n", "--dry-run", field=None, is_flag=True,
           help="Print the resolved options, parameter counts, and what a --resume would start from; write nothing."),
    # Data
    switch("--cond", field="data.use_labels", help="Condition on the labels of the data set."),
    option("--subset", field="data.max_images", type=int, metavar="INT",
           help="Train with a random subset of this many images."),
    option("--holdout", field="data.holdout", type=int, metavar="INT",
           help="Hold out this many images, and log how D tells them from those it was trained with. [0]"),
    switch("--mirror", field="data.mirror", help="Also show every image flipped left to right."),
    option("--timeout", field="run.timeout", type=float, metavar="SEC",
           help="How long processes wait for one that has stopped before they name it and end. [1800]"),
    option("--workers", field="run.workers", type=int, metavar="INT",
           help="Processes that decode images, per GPU; none for images that stay on the device. [2; 0 on a CPU]"),
    # How long and how loud
    option("--kimg", field="run.total_kimg", type=float, metavar="KIMG",
           help="Length of the training in thousands of real images."),
    option("--tick", field="run.tick_kimg", type=float, metavar="KIMG",
           help="Interval of progress lines and statistics. [4]"),
    option("--snap", field="run.snapshot_ticks", type=int, metavar="TICKS",
           help="Interval of snapshots, image grids and metrics. [50]"),
    option("--metrics", field="run.metrics", type=NameList(),
           help="Metrics at every snapshot, or none; the best network by the first one is kept. [fid50k_full or swd]"),
    option("--metrics-every", field="run.metrics_every", type=int, metavar="TICKS",
           help="Interval of these metrics. [at snapshots]"),
    option("--tick-metrics", field="run.tick_metrics", type=NameList(),
           help="Cheap metrics at every tick, e.g. fid5k. [none]"),
    option("--log", field="run.log", type=NameList(),
           help="Log statistics and image grids to tensorboard, wandb (Weights & Biases), or none. [tensorboard]"),
    option("--detector", field="run.detectors", type=NameList(), metavar="FILE,...",
           help="For metrics: a feature network of your own, weight files, a folder of DINOv2. Such a network is a "
                "program: use only those you trust."),
    option("--keep-last", field="run.keep_last", type=int, metavar="INT", help="Training states to keep. [2]"),
    option("--keep-every", field="run.keep_every", type=float, metavar="KIMG",
           help="Also keep the first one at or after each multiple of this. [none]"),
    switch("--keep-best", field="run.keep_best", help="Also keep that of the best network by the first of --metrics."),
    option("--profile", field="run.profile_steps", type=int, metavar="STEPS",
           help="Write a Chrome trace of this many steps."),
    # Training
    option("--batch", field="batch_size", type=int, metavar="INT", help="Images per step, over all GPUs."),
    option("--batch-gpu", field="run.batch_gpu", type=IntOrAuto(),
           help="Images at a time per GPU; gradients accumulate. auto: as many as fit. [batch/gpus]"),
    option("--glr", field="g_optimizer.lr", type=float, metavar="FLOAT", help="Learning rate of the generator."),
    option("--dlr", field="d_optimizer.lr", type=float, metavar="FLOAT", help="Learning rate of the discriminator."),
    option("--clip", field="g_optimizer.clip_norm", also=("d_optimizer.clip_norm",), type=float, metavar="FLOAT",
           help="Clip the norm of each network's gradient to this. [none]"),
    option("--loss", field="loss.objective", type=click.Choice(get_args(Objective)),
           help="Training objective. [logistic]"),
    option("--n-critic", field="loss.n_critic", type=int, metavar="STEPS",
           help="Discriminator steps per generator step. [1]"),
    option("--g-batch-scale", field="loss.g_batch_scale", type=int, metavar="INT",
           help="Batch of the generator, as a multiple of the discriminator's. [1]"),
    option("--gp-weight", field="loss.gp_weight", type=float, metavar="FLOAT",
           help="Weight of the gradient penalty of wgangp-eps. [10]"),
    option("--drift-weight", field="loss.drift_weight", type=float, metavar="FLOAT",
           help="Weight of its drift term, the squared mean logit of reals. [0.001]"),
    option("--gamma", field="loss.r1_gamma", type=float, metavar="FLOAT",
           help="Weight of R1 regularisation; with relativistic, of R1 and R2."),
    option("--r1-interval", field="loss.r1_interval", type=int, metavar="STEPS",
           help="Lazy regularisation: interval of R1. [16]"),
    option("--pl-weight", field="loss.pl_weight", type=float, metavar="FLOAT",
           help="Weight of path length regularisation, 0 = off."),
    option("--pl-interval", field="loss.pl_interval", type=int, metavar="STEPS",
           help="Lazy regularisation: interval of path length. [4]"),
    option("--mixing", field="loss.style_mixing", type=float, metavar="0..1", help="Probability of style mixing."),
    option("--ema-kimg", field="ema.kimg", type=float, metavar="KIMG",
           help="Half-life of the averaged generator, G_ema."),
    option("--ema-rampup", field="ema.rampup", type=float, metavar="FLOAT",
           help="Ramp-up of the half-life, as a fraction of the images so far."),
    option("--freezed", field="freeze_layers", type=int, metavar="INT",
           help="Freeze-D: freeze this many layers of D, counted from the image. [0]"),
    # Augmentation
    option("--aug", field="augment.mode", type=Choice(get_args(Mode), none="noaug"),
           help="Augmentation; none is another word for noaug. [ada]"),
    option("--p", field="augment.p", type=float, metavar="0..1", help="Probability, for --aug=fixed."),
    option("--target", field="augment.target", type=float, metavar="0..1",
           help="Target of ADA: mean sign of D(real). [0.6]"),
    option("--augpipe", field="augment.pipe", metavar="NAME",
           help="blit, geom, color, filter, noise, cutout, bg, bgc, bgcf, bgcfn or bgcfnc. [bgc]"),
    option("--diffaug", field="augment.policy", type=NameList(),
           help=f"For --aug=diffaug: transforms in their order, of {', '.join(DIFFAUG)}. [{','.join(DEFAULT_POLICY)}]"),
    option("--translation", field="augment.translation", type=float, metavar="0..1",
           help="Largest shift of DiffAugment's translation, as a fraction of the image's size. [0.125]"),
    option("--cutout-p", field="augment.cutout_p", type=float, metavar="0..1",
           help="Probability of DiffAugment's cutout or erase, drawn once per micro-batch. [1]"),
    option("--filter-p", field="augment.filter_p", type=float, metavar="0..1",
           help="Probability of DiffAugment's filter, per image and frequency band. [1]"),
    option("--hue-p", field="augment.hue_p", type=float, metavar="0..1",
           help="Probability of DiffAugment's hue, per image. [1]"),
    option("--ada-kimg", field="augment.ada_kimg", type=float, metavar="KIMG",
           help="Speed of ADA: how long p takes at least to move by 1. [500]"),
    option("--max-p", field="augment.max_p", type=float, metavar="0..1", help="Upper bound of ADA's p."),
    # Generator
    option("--gen", field="generator.family", metavar="NAME",
           help=f"Family: {', '.join(GENERATORS)}. [the preset's; most have {next(iter(GENERATORS))}]"),
    option("--g_dict", field="generator.widths", type=IntList(), help="Hidden size per resolution, lowest first."),
    option("--num_layers", field="generator.layers", type=IntList(), help="Encoder blocks per resolution."),
    option("--base", field="generator.base", type=Size(),
           help="Lowest resolution of the generator: 8, or 8x12 for height x width."),
    option("--depth", field="generator.depth", type=int, metavar="INT", help="Channels per attention head. [32]"),
    option("--minimum_head", field="generator.minimum_head", type=int, metavar="INT",
           help="Minimum number of heads. [1]"),
    switch("--linformer", field="generator.linformer", help="Linformer attention where there are many tokens."),
    option("--linformer-k", field="generator.linformer_k", type=int, metavar="INT",
           help="Tokens that keys and values are projected to. [256]"),
    option("--linformer-tokens", field="generator.linformer_min_tokens", type=int, metavar="INT",
           help="Minimum number of tokens for it to apply. [1024]"),
    switch("--ffn", field="generator.ffn", help="A feed-forward network in every encoder block. [0]"),
    option("--layernorm", field="generator.layernorm", type=Choice(get_args(LayerNormPlace)),
           help="LayerNorm before queries, keys and values, or after attention. [before]"),
    switch("--style-attention", field="generator.style_attention",
           help="Styles modulate the input of attention, besides its values. [1]"),
    switch("--residual", field="generator.residual", help="Residual connection around attention, from the values. [1]"),
    option("--handover", field="generator.handover", type=int, metavar="RES",
           help="Highest resolution of encoder blocks in Styleformer-C; above it are StyleGAN2's convolutions. [32]"),
    option("--g-arch", field="generator.architecture", type=click.Choice(["orig", "skip", "resnet"]),
           help="Architecture of StyleGAN2. [skip]"),
    option("--g-cbase", field="generator.channel_base", type=int, metavar="INT",
           help="Channel base of its convolutions: channels x resolution."),
    option("--g-cmax", field="generator.channel_max", type=int, metavar="INT",
           help="Maximum number of these channels. [512]"),
    option("--attention", field="generator.attention", type=click.Choice(get_args(Form)),
           help="TransGAN's attention where there are many tokens. [grid]"),
    option("--full-upto", field="generator.full_upto", type=int, metavar="RES",
           help="Highest resolution with attention among all tokens, whatever --attention says. [32]"),
    option("--window", field="generator.window", type=int, metavar="INT",
           help="Side of the windows of --attention=grid, in tokens. [16]"),
    option("--landmarks", field="generator.landmarks", type=int, metavar="INT",
           help="Landmarks of --attention=nystrom. [64]"),
    option("--heads", field="generator.num_heads", type=int, metavar="INT", help="Its attention heads. [4]"),
    option("--norm", field="generator.norm", type=click.Choice(get_args(Norm)),
           help="Its normalisation: token-wise or LayerNorm. [token]"),
    option("--position", field="generator.position", type=click.Choice(get_args(Position)),
           help="Its positions: an embedding per token, a bias per offset, or both. [both]"),
    switch("--attention-noise", field="generator.attention_noise",
           help="Add noise per token, of learned strength, to the input of TransGAN's self-attention. [0]"),
    option("--latent-tokens", field="generator.latent_tokens", type=int, metavar="INT",
           help="Tokens made from z that every block also attends to. [0]"),
    option("--antialias", field="generator.antialias", type=int, metavar="INT",
           help="Low-pass filter this many of its upsamplings, the last ones. [0]"),
    option("--z-dim", field="generator.z_dim", type=int, metavar="INT", help="Size of the latent z. [512]"),
    option("--w-dim", field="generator.w_dim", type=int, metavar="INT", help="Size of the style w. [512]"),
    option("--map-depth", field="generator.mapping_layers", type=int, metavar="INT",
           help="Layers of the mapping network."),
    # Discriminator
    option("--disc", field="discriminator.family", metavar="NAME",
           help=f"Family: {', '.join(DISCRIMINATORS)}. [the preset's; most have {next(iter(DISCRIMINATORS))}]"),
    option("--d-arch", field="discriminator.architecture", type=click.Choice(["orig", "skip", "resnet"]),
           help="Architecture. [resnet]"),
    option("--cbase", field="discriminator.channel_base", type=int, metavar="INT",
           help="Channel base of D: channels x resolution."),
    option("--cmax", field="discriminator.channel_max", type=int, metavar="INT",
           help="Maximum number of D's channels. [512]"),
    option("--mbstd", "--mbstd-group", field="discriminator.mbstd_group_size", type=int, metavar="INT",
           help="Group size of minibatch-std, 0 = off."),
    option("--d-patch", field="discriminator.patch", type=int, metavar="INT",
           help="Side of the (finest) patches of a transformer D, in pixels."),
    option("--d-widths", field="discriminator.widths", type=IntList(),
           help="Channels that each scale of TransGAN's D adds, finest first."),
    option("--d-layers", field="discriminator.layers", type=IntList(), help="Its blocks per scale or grid."),
    option("--d-local", field="discriminator.local_layers", type=IntList(),
           help="How many of these, the first, attend as --d-attention says; the others among all tokens."),
    option("--d-attention", field="discriminator.attention", type=click.Choice(get_args(Form)),
           help="As --attention. [grid]"),
    option("--d-window", field="discriminator.window", type=int, metavar="INT", help="As --window. [16]"),
    option("--d-landmarks", field="discriminator.landmarks", type=int, metavar="INT", help="As --landmarks. [64]"),
    option("--d-heads", field="discriminator.num_heads", type=int, metavar="INT", help="As --heads. [4]"),
    option("--d-norm", field="discriminator.norm", type=click.Choice(get_args(Norm)), help="As --norm. [layer]"),
    option("--d-position", field="discriminator.position", type=click.Choice(get_args(Position)),
           help="As --position. [both]"),
    switch("--d-attention-noise", field="discriminator.attention_noise", help="As --attention-noise. [0]"),
    switch("--multi-scale", field="discriminator.multi_scale",
           help="Patches of the image join at every scale; off: at the finest alone. [on]"),
    option("--d-depth", field="discriminator.depth", type=int, metavar="INT",
           help="Channels per attention head of the styleformer D. [32]"),
    option("--d-linformer-k", field="discriminator.linformer_k", type=int, metavar="INT",
           help="As --linformer-k. [256]"),
    option("--d-linformer-tokens", field="discriminator.linformer_min_tokens", type=int, metavar="INT",
           help="As --linformer-tokens. [1024]"),
    switch("--overlap", field="discriminator.overlap", help="The finest patches overlap by half. [off]"),
    # Arithmetic, speed and memory
    option("--precision", field="precision", type=click.Choice(["fp32", "bf16", "fp16"]),
           help="Precision of activations in training. [bf16 on GPUs that have it, else fp32]"),
    switch("--fp32", field=None, help="The same as --precision=fp32."),
    option("--reduced-from", field="reduced_from", type=int, metavar="RES",
           help="Lowest resolution that uses --precision; lower ones use float32. [0]"),
    switch("--allow-tf32", field="allow_tf32", help="Allow TF32 in float32 matrix products and convolutions."),
    option("--nan", field="run.nan", type=click.Choice(["stop", "skip"]),
           help="After values that are not finite: stop at the tick, or go on without their updates. [stop]"),
    switch("--nhwc", field="channels_last", help="Channels-last memory layout. [on GPUs, unless fp32]"),
    switch("--data-on-gpu", field="run.data_on_gpu",
           help="Keep all images decoded on the device. [on GPUs, if they are few]"),
    switch("--graphs", field="run.graphs",
           help="Record whole phases as CUDA graphs: no launch overhead. [on GPUs, up to 64x64]"),
    switch("--compile", field="run.compile", help="torch.compile for the main phases."),
    switch("--grad-checkpoint", field="run.recompute",
           help="Gradient checkpointing: recompute activations in the backward pass; less memory, more time."),
    switch("--deterministic", field="run.deterministic",
           help="Bit-identical results every time, also on a GPU; slower."),
    switch("--nobench", field=None, help="Turn off cuDNN benchmarking."),
)
# fmt: on


@click.command(cls=dnnlib.cli.Script, context_settings={"max_content_width": 110, "show_default": False})
@dnnlib.cli.with_options(OPTIONS)
@click.pass_context
def main(context: click.Context, **options: Any) -> None:
    """Train a Styleformer, or another generator, against a StyleGAN2 discriminator under adaptive augmentation.

    What is not given comes from the preset (--cfg); [brackets] show what most presets say.

    \b
    python train.py --outdir=runs --data=mydata.zip --gpus=1 --batch=32 --cfg=cifar \\
        --g_dict=256,64,16 --num_layers=1,2,2 --depth=32
    """
    for name in ("data.path", "outdir"):
        _require(context, name)
    plain = _requested_config(context, {})
    dataset = ImageDataset(plain.data)
    device = distributed.choose_device(plain.run.device)
    request = runs.Request(
        outdir=Path(options["outdir"]),
        resume=options["resume"],
        override=bool(options["override"]),
        plain=plain,
        transfer=_requested_config(
            context, {**TRANSFER_LEARNING, **_options_of(options["resume"], options["dry_run"])}
        ),
        about=_circumstances(dataset, device),
    )
    is_first = distributed.launched_rank() == 0
    if is_first:
        dataset.check_shapes(partial(fitting_size, request.config))
    config = resolve(request.config, request.about)
    distributed.check_processes(config.run.num_gpus, config.run.device, device)
    if config.run.workers or config.run.num_gpus > 1:
        allow_open_files(config.run.workers or 0)
    choose_loggers(config.run.log)
    if options["dry_run"]:
        if is_first:
            _print_plan(runs.find_start(request), dataset)
        return
    if config.run.metrics is None and is_first:
        _prepare_default_metrics(config.run)
    distributed.launch(train_worker, config.run.num_gpus, request, device_type=device.type, timeout=config.run.timeout)


def _require(context: click.Context, name: str) -> None:
    for parameter in context.command.params:
        if name in (parameter.name, getattr(parameter, "field", None)) and context.params[parameter.name or ""] is None:
            raise click.UsageError(f"missing option {parameter.opts[0]}", context)


def _circumstances(dataset: ImageDataset, device: torch.device) -> Circumstances:
    return Circumstances(
        img_shape=dataset.img_shape,
        c_dim=dataset.c_dim,
        is_raw=dataset.is_raw,
        on_gpu=device.type == "cuda",
        has_bf16=distributed.has_bf16(device),
    )


def _prepare_default_metrics(run: RunConfig) -> None:
    """Fetch what the metrics that are computed without --metrics need."""
    setup = read_detectors(run.detectors)
    for name in metrics.registry.default_metrics(setup)[0]:
        metrics.registry.check_available(name, setup)


def _requested_config(context: click.Context, base: Mapping[str, Any]) -> TrainConfig:
    """The preset, changed by `base`, the launcher and the options, in this order. Refuses metrics that cannot be."""
    values = dnnlib.cli.config_values(context)
    if context.params["fp32"] and values.setdefault("precision", "fp32") != "fp32":
        raise ConfigError("precision", values["precision"], "contradicts --fp32: give one of the two")
    if context.params["nobench"]:
        values["run.cudnn_benchmark"] = False
    if values.get("run.data_on_gpu") and values.get("run.workers"):
        raise ConfigError("run.workers", values["run.workers"], "has no work with --data-on-gpu: give one of the two")
    setup = read_detectors(values.get("run.detectors", ()))
    for field in ("run.metrics", "run.tick_metrics"):
        if field in values:
            values[field] = tuple(metrics.registry.resolve(values[field], setup))
            is_to_fetch = distributed.launched_rank() == 0 and not context.params["dry_run"]  # one process does
            for name in values[field] if is_to_fetch else ():
                metrics.registry.check_available(name, setup)
    launched = distributed.launched_world_size()
    if launched is not None:
        given = values.setdefault("run.num_gpus", launched)
        if given != launched:
            raise ConfigError("run.num_gpus", given, f"torchrun started {launched} processes; leave --gpus out")
    return customise(override(PRESETS[context.params["cfg"]], base), values)


def _options_of(resume: str | None, dry_run: bool) -> dict[str, Any]:
    """Return what the file to start from says about the training; what is on the web is not fetched for a dry run."""
    if resume is None or not runs.names_snapshot(resume) or (dry_run and is_url(resume)):
        return {}
    return legacy.transfer_options(resume)


def _print_plan(start: runs.Start, dataset: ImageDataset) -> None:
    """What would be trained, and from which weights; what is on the web is not fetched for it."""
    config = start.config
    for note in dataset.notes:
        click.echo(f"Note: {note}", err=True)
    with torch.device("meta"):
        networks = {"G": config.generator.build(), "D": config.discriminator.build()}
    parameters = {name: count_parameters(network) for name, network in networks.items()}
    if start.snapshot and not is_url(start.snapshot):
        networks["G_ema"] = networks["G"]
        snapshot = legacy.load_network(start.snapshot)
        for note in runs.notes_on(start.snapshot, snapshot):
            click.echo(note, err=True)
        config, _ = runs.transfer(config, networks, start.snapshot, snapshot)
    plan = {"options": to_json(config), "parameters": parameters, "images": len(dataset)}
    click.echo(json.dumps(plan, indent=2))


if __name__ == "__main__":
    main()
