"""Train a GAN. This file defines the command line; training/startup.py starts the run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from dnnlib.cli import (
    Script,
    config_texts,
    explain_error,
    list_option,
    option,
    settings_option,
    switch,
    with_sections,
)
from dnnlib.config import ConfigError, did_you_mean

PRESETS = {  # their values are in training/config.py
    "auto": "chosen by the resolution of the images",
    "tiny": "32x32 on a CPU, minutes",
    "cifar": "Styleformer for CIFAR-10",
    "cifar-large": "the paper's model for CIFAR-10",
    "cifar-stylegan2": "StyleGAN2-ADA for CIFAR-10",
    "styleformer2": "cifar with Styleformer2 and its recipe",
    "stl10-medium": "the paper's model for STL-10, 48x48",
    "celeba64-l": "Styleformer-L for CelebA, 64x64",
    "church128-l": "Styleformer-L for LSUN Church, 128x128",
    "styleformer-c256": "Styleformer-C for scenes, 256x256",
    "stylegan2": "StyleGAN2-ADA, configuration F",
    "paper256": "StyleGAN2-ADA paper's setup, 256x256",
    "paper512": "StyleGAN2-ADA paper's setup, 512x512",
    "paper1024": "StyleGAN2-ADA paper's setup, 1024x1024",
    "transgan-cifar": "TransGAN for CIFAR-10",
    "transgan-stl10": "TransGAN for STL-10, 48x48",
    "transgan-celeba64": "TransGAN for CelebA, 64x64",
    "transgan-celeba128": "TransGAN for CelebA, 128x128",
    "transgan-church256": "TransGAN for LSUN Church, 256x256",
    "transgan-celebahq256": "TransGAN for CelebA-HQ, 256x256",
    "r3gan-cifar": "R3GAN for CIFAR-10, with labels",
    "r3gan-stackedmnist": "R3GAN for StackedMNIST, 32x32",
    "r3gan-ffhq64": "R3GAN for FFHQ, 64x64",
    "r3gan-ffhq256": "R3GAN for FFHQ, 256x256",
    "r3gan-imagenet32": "R3GAN for ImageNet, 32x32, with labels",
    "r3gan-imagenet64": "R3GAN for ImageNet, 64x64, with labels",
    "stylegan3-t": "StyleGAN3, equivariant to translation, from 64x64",
    "stylegan3-r": "StyleGAN3, equivariant to rotation too",
    "styleformer-a": "alias-free Styleformer, from 64x64",
    "styleformer-f": "Styleformer with a Fourier input",
    "ablation-ffn": "cifar with a feed-forward network",
    "ablation-depth16": "cifar with 16 channels per head",
    "ablation-depth64": "cifar with 64 channels per head",
    "ablation-norm-after": "cifar with LayerNorm after attention",
    "ablation-no-style": "cifar without styles before attention",
    "ablation-no-residual": "cifar without residual connection",
}


def _choose_preset(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    if name == "help":
        click.echo("\n".join(f"{preset:22}{summary}" for preset, summary in PRESETS.items()))
        context.exit()
    if name is not None and name not in PRESETS:
        raise click.BadParameter(f"no preset {name!r}; --cfg=help lists the presets{did_you_mean(name, PRESETS)}")
    return name


def _complete_preset(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    return [CompletionItem(name, help=text) for name, text in PRESETS.items() if name.startswith(incomplete)]


# fmt: off
OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "General": (
        option("--outdir", metavar="DIR", help="Folder for all runs; each run creates a numbered subfolder."),
        option("--data", field="data.path", metavar="PATH", help="Training dataset: zip or folder (dataset_tool.py)."),
        option("--cfg", metavar="PRESET", callback=_choose_preset, shell_complete=_complete_preset,
               help="Preset; --cfg=help lists them. [auto]"),
        option("--gpus", field="run.num_gpus", metavar="INT", help="Processes on this machine, one per GPU. [1]"),
        option("--device", field="run.device", metavar="NAME", help="cpu, cuda or cuda:N. [a GPU if there is one]"),
        option("--resume", metavar="latest|DIR|PT|PKL|URL",
               help="Resume the newest run in --outdir that matches the options (latest), or the run in a folder; or "
                    "start a new run from a training state, or from a snapshot's weights (transfer learning)."),
        switch("--override", help="Resume a run even if changed options affect its results."),
        option("--desc", field="run.desc", metavar="WORD", help="Suffix of the run folder's name."),
        option("--seed", field="seed", metavar="INT", help="Random seed of weights, latents, data order, noise. [0]"),
        option("-n", "--dry-run", is_flag=True,
               help="Print the resolved options, parameter counts and the source of --resume; write nothing."),
        option("--forecast", is_flag=True,
               help="With -n: train for about 20 seconds, and print the time, memory and disk space of the run."),
        settings_option(),
    ),
    "Data": (
        switch("--cond", field="data.use_labels", help="Condition on the labels of the dataset."),
        option("--subset", field="data.max_images", metavar="INT",
               help="Train on a random subset of this many images."),
        option("--holdout", field="data.holdout", metavar="INT",
               help="Hold out this many images and log D's mean logits for them, to monitor overfitting. [0]"),
        switch("--mirror", field="data.mirror", help="Extend the dataset with horizontally flipped images."),
        option("--workers", field="run.workers", metavar="INT",
               help="Data loader processes per GPU. [2; 0 on a CPU]"),
    ),
    "Training": (
        option("--kimg", field="run.total_kimg", metavar="KIMG", help="Training length, in thousands of real images."),
        option("--batch", field="batch_size", metavar="INT", help="Total batch size over all GPUs."),
        option("--batch-gpu", field="run.batch_gpu", metavar="INT|auto",
               help="Micro-batch size per GPU, with gradient accumulation. auto: the largest that fits. [batch/gpus]"),
        option("--glr", field="g_optimizer.lr", metavar="FLOAT|SCHEDULE",
               help="Learning rate of G. docs/schedules.md describes schedules."),
        option("--dlr", field="d_optimizer.lr", metavar="FLOAT|SCHEDULE", help="Learning rate of D."),
        option("--loss", field="loss.objective", metavar="NAME",
               help="logistic, hinge, wgangp-eps or relativistic. [logistic]"),
        option("--gamma", field="loss.r1_gamma", metavar="FLOAT|SCHEDULE",
               help="Weight of R1 regularisation; with relativistic, of R1 and R2."),
        option("--pl-weight", field="loss.pl_weight", metavar="FLOAT",
               help="Weight of path length regularisation, 0 = off."),
        option("--mixing", field="loss.style_mixing", metavar="0..1", help="Probability of style mixing."),
        option("--ema-kimg", field="ema.kimg", metavar="KIMG|SCHEDULE",
               help="Half-life of G_ema, the moving average of G."),
        option("--freezed", field="freeze_layers", metavar="INT",
               help="Freeze-D: freeze this many layers of D, starting at the image. [0]"),
    ),
    "Augmentation": (
        option("--aug", field="augment.mode", metavar="NAME", help="noaug (none), ada, fixed, diffaug or apa. [ada]"),
        option("--p", field="augment.p", metavar="0..1|SCHEDULE",
               help="Augmentation probability for --aug=fixed."),
        option("--target", field="augment.target", metavar="0..1",
               help="Target of ada and apa for the mean sign of D(real). [0.6]"),
        option("--augpipe", field="augment.pipe", metavar="NAME",
               help="blit, geom, color, filter, noise, cutout, bg, bgc, bgcf, bgcfn, bgcfnc or bgcc. [bgc]"),
    ),
    "Generator": (
        option("--gen", field="generator.family", metavar="NAME",
               help="Family: styleformer, stylegan2, styleformer-c, styleformer2, transgan, r3gan, stylegan3 or "
                    "styleformer-a. [the preset's]"),
        option("--g_dict", field="generator.widths", metavar="INT,...",
               help="Hidden sizes, lowest grid first (styleformer, styleformer-c, styleformer2, transgan, r3gan)."),
        option("--num_layers", field="generator.layers", metavar="INT,...",
               help="Blocks per resolution (styleformer, styleformer-c, styleformer2, transgan, r3gan)."),
        option("--base", field="generator.base", metavar="N|HxW",
               help="Lowest resolution: 8, or 8x12 for height x width (styleformer, stylegan2, styleformer-c, "
                    "styleformer2, transgan, r3gan)."),
        option("--depth", field="generator.depth", metavar="INT",
               help="Channels per attention head (styleformer, styleformer-c, styleformer2, styleformer-a). [32]"),
        option("--minimum_head", field="generator.minimum_head", metavar="INT",
               help="Minimum number of heads (styleformer, styleformer-c, styleformer2). [1]"),
        switch("--linformer", field="generator.linformer",
               help="Linformer attention at resolutions with many tokens (styleformer, styleformer-c, styleformer2)."),
        option("--z-dim", field="generator.z_dim", metavar="INT", help="Size of the latent z (all families). [512]"),
        option("--map-depth", field="generator.mapping_layers", metavar="INT",
               help="Layers of the mapping network (all families)."),
    ),
    "Discriminator": (
        option("--disc", field="discriminator.family", metavar="NAME",
               help="Family: stylegan2, styleformer, transgan or r3gan. [the preset's]"),
        option("--d-arch", field="discriminator.architecture", metavar="NAME",
               help="orig, skip or resnet (stylegan2). [resnet]"),
        option("--cbase", field="discriminator.channel_base", metavar="INT",
               help="Channel base: channels x resolution (stylegan2, styleformer)."),
        option("--mbstd", field="discriminator.mbstd_group_size", metavar="INT",
               help="Group size of minibatch standard deviation, 0 = off (stylegan2, styleformer)."),
    ),
    "Speed": (
        option("--precision", field="precision", metavar="NAME",
               help="Precision of activations in training: fp32, bf16 or fp16. [bf16 on GPUs with bf16, else fp32]"),
        switch("--fp32", help="Same as --precision=fp32."),
        switch("--nhwc", field="channels_last", help="Channels-last memory layout. [on GPUs, unless fp32]"),
        switch("--nobench", help="Turn off cuDNN benchmarking."),
        switch("--allow-tf32", field="allow_tf32", help="Allow TF32 in float32 matrix products and convolutions."),
        switch("--graphs", field="run.graphs", help="Capture phases as CUDA graphs. [on GPUs, up to 64x64]"),
        switch("--compile", field="run.compile", help="torch.compile where no second derivatives are needed."),
        switch("--grad-checkpoint", field="run.recompute",
               help="Recompute activations in the backward pass: less memory, more time."),
        switch("--deterministic", field="run.deterministic",
               help="Bit-reproducible results, also on a GPU; slower."),
    ),
    "Logging": (
        option("--tick", field="run.tick_kimg", metavar="KIMG", help="Interval of progress lines and statistics. [4]"),
        option("--snap", field="run.snapshot_ticks", metavar="TICKS",
               help="Interval of snapshots, image grids and metrics. [50]"),
        list_option("--metrics", field="run.metrics", help="Metrics at every snapshot, or none. [fid50k_full or swd]"),
        list_option("--detector", field="run.detectors",
                    help="For metrics: a feature network, weight files, or a DINOv2 folder. A feature network is a "
                         "program: use only files that you trust."),
        list_option("--log", field="run.log", help="tensorboard, wandb (Weights & Biases), or none. [tensorboard]"),
        switch("--keep-best", field="run.keep_best",
               help="Also keep the training state with the best value of the first metric."),
    ),
}
# fmt: on

REMOVED = {  # flag of an earlier version -> its field or fields
    "--timeout": "run.timeout",
    "--metrics-every": "run.metrics_every",
    "--tick-metrics": "run.tick_metrics",
    "--keep-last": "run.keep_last",
    "--keep-every": "run.keep_every",
    "--profile": "run.profile_steps",
    "--nan": "run.nan",
    "--data-on-gpu": "run.data_on_gpu",
    "--reduced-from": "reduced_from",
    "--clip": "g_optimizer.clip_norm d_optimizer.clip_norm",
    "--n-critic": "loss.n_critic",
    "--g-batch-scale": "loss.g_batch_scale",
    "--gp-weight": "loss.gp_weight",
    "--drift-weight": "loss.drift_weight",
    "--r1-interval": "loss.r1_interval",
    "--pl-interval": "loss.pl_interval",
    "--ema-rampup": "ema.rampup",
    "--diffaug": "augment.policy",
    "--translation": "augment.translation",
    "--cutout-p": "augment.cutout_p",
    "--filter-p": "augment.filter_p",
    "--hue-p": "augment.hue_p",
    "--ada-kimg": "augment.ada_kimg",
    "--max-p": "augment.max_p",
    "--linformer-k": "generator.linformer_k",
    "--linformer-tokens": "generator.linformer_min_tokens",
    "--ffn": "generator.ffn",
    "--layernorm": "generator.layernorm",
    "--style-attention": "generator.style_attention",
    "--residual": "generator.residual",
    "--handover": "generator.handover",
    "--g-arch": "generator.architecture",
    "--g-cbase": "generator.channel_base",
    "--g-cmax": "generator.channel_max",
    "--attention": "generator.attention",
    "--full-upto": "generator.full_upto",
    "--window": "generator.window",
    "--landmarks": "generator.landmarks",
    "--heads": "generator.num_heads",
    "--norm": "generator.norm",
    "--position": "generator.position",
    "--attention-noise": "generator.attention_noise",
    "--latent-tokens": "generator.latent_tokens",
    "--antialias": "generator.antialias",
    "--w-dim": "generator.w_dim",
    "--cmax": "discriminator.channel_max",
    "--mbstd-group": "discriminator.mbstd_group_size",
    "--d-patch": "discriminator.patch",
    "--d-widths": "discriminator.widths",
    "--d-layers": "discriminator.layers",
    "--d-local": "discriminator.local_layers",
    "--d-attention": "discriminator.attention",
    "--d-window": "discriminator.window",
    "--d-landmarks": "discriminator.landmarks",
    "--d-heads": "discriminator.num_heads",
    "--d-norm": "discriminator.norm",
    "--d-position": "discriminator.position",
    "--d-attention-noise": "discriminator.attention_noise",
    "--multi-scale": "discriminator.multi_scale",
    "--d-depth": "discriminator.depth",
    "--d-linformer-k": "discriminator.linformer_k",
    "--d-linformer-tokens": "discriminator.linformer_min_tokens",
    "--overlap": "discriminator.overlap",
}


@click.command(cls=Script, removed=REMOVED, context_settings={"max_content_width": 110, "show_default": False})
@with_sections(OPTIONS)
@click.pass_context
def main(context: click.Context, **options: Any) -> None:
    """Train a GAN: Styleformer, StyleGAN2, TransGAN or R3GAN networks, with adaptive discriminator augmentation.

    Options not given default to the values of the preset (--cfg); [brackets] show the value in most presets.

    \b
    python train.py --outdir=runs --data=mydata.zip --gpus=1 --batch=32 --cfg=cifar \\
        --g_dict=256,64,16 --num_layers=1,2,2 --depth=32
    """
    from training import resume, startup  # imported here, so that --help does not import torch

    request = resume.RunRequest(
        outdir=options["outdir"] and Path(options["outdir"]),
        resume=options["resume"],
        override=bool(options["override"]),
        preset=options["cfg"],
        texts=_option_texts(context),
    )
    explain = partial(explain_error, context.command)
    startup.train(request, dry_run=options["dry_run"], forecast=options["forecast"], explain=explain)


def _option_texts(context: click.Context) -> dict[str, str]:
    """Return {config path: text} of all options, including --fp32 and --nobench."""
    texts = config_texts(context)
    if context.params["fp32"] and texts.setdefault("precision", "fp32") != "fp32":
        raise ConfigError("precision", texts["precision"], "contradicts --fp32: give one of the two")
    if context.params["nobench"]:
        texts["run.cudnn_benchmark"] = "false"
    return texts


if __name__ == "__main__":
    main()
