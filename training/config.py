"""TrainConfig, the presets, and the resolution of a preset for a dataset and a number of GPUs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Any, Literal

from dnnlib.config import ConfigError, check_bounds, field_names, from_json, is_config, override, setting, to_json
from dnnlib.schedule import Schedule
from torch_utils.kernels import KERNELS
from torch_utils.misc import OnMeta
from training import image_size
from training.augment.diffaugment import DEFAULT_POLICY, PARAMETERS
from training.augment.pipe import MODE_FIELDS, AugmentConfig, AugmentPipe
from training.augment.stages import PIPES
from training.data_sources.sizes import Size, Sizes
from training.dataset import DatasetConfig
from training.ema import EMAConfig
from training.loss import LAZY_R1, SLICING, LossConfig
from training.networks import DISCRIMINATORS, GENERATORS
from training.networks.attention import BACKENDS
from training.networks.discriminator import DiscriminatorConfig
from training.networks.generator import GeneratorConfig
from training.networks.r3gan import R3GANConfig
from training.networks.r3gan_discriminator import R3GANDiscriminatorConfig
from training.networks.styleformer import StyleformerConfig
from training.networks.styleformer2 import Styleformer2Config
from training.networks.styleformer_a import StyleformerAConfig
from training.networks.stylegan2 import StyleGAN2Config
from training.networks.stylegan2_discriminator import StyleGAN2DiscriminatorConfig
from training.networks.stylegan3 import StyleGAN3Config
from training.networks.transgan import TransGANConfig
from training.networks.transgan_discriminator import TransGANDiscriminatorConfig
from training.phases import AdamConfig
from training.snapshots.transfer import Origin

Precision = Literal["fp32", "bf16", "fp16"]
GRAPHS_SIDE = 64  # longer side in pixels up to which kernel launches limit the training speed
LOGGERS = ("tensorboard", "wandb")  # in training/loggers.py; each is named after its package


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Duration, device, micro-batches, logging. These settings may change when a run is resumed.

    The micro-batch (`batch_gpu`) affects minibatch standard deviation, path length and the drift term of wgangp-eps,
    which are computed per micro-batch, loss.penalty_share, which is rounded down to images of a micro-batch, and
    DiffAugment's cutout, which is switched on or off per micro-batch. No other setting changes the result of a step,
    except for rounding (`compile`, `graphs`) and skipped steps (`nan`).
    """

    total_kimg: float = setting(25_000, "Training length, in thousands of real images.", above=0)
    tick_kimg: float = setting(4, "Interval between progress lines and statistics, in thousands of images.", above=0)
    snapshot_ticks: int = setting(
        50, "Interval between snapshots, training states and image grids, in ticks.", at_least=1
    )
    keep_last: int = setting(
        2, "Number of latest training states to keep; 2 or more guard against a corrupt file.", at_least=1
    )
    keep_every: float | None = setting(
        None,
        "Interval between permanently kept training states, in thousands of images; None: keep none permanently.",
        above=0,
    )
    keep_best: bool = setting(False, "Also keep the training state with the best value of the first metric.")
    metrics: tuple[str, ...] | None = setting(
        None, "Metrics at snapshots; the first selects the best network. None: fid50k_full or swd.", auto=True
    )
    metrics_every: int | None = setting(
        None, "Interval between metric evaluations, in ticks; None: every snapshot.", at_least=1
    )
    metrics_first: bool = setting(False, "Also compute the metrics before the first step, of random weights.")
    tick_metrics: tuple[str, ...] = setting((), "Cheap metrics to evaluate at every tick.")
    log: tuple[str, ...] | None = setting(
        None,
        "Loggers of statistics and images; None: TensorBoard if it is installed.",
        auto=True,
        choices=LOGGERS,
        note="`none` turns logging off",
    )
    detectors: tuple[str, ...] = setting(
        (), "Detectors for metrics: paths of feature networks, weight files or folders."
    )
    desc: str = setting("", "Suffix of the run folder's name: at most 60 letters, digits and -_.")
    num_gpus: int = setting(1, "Number of processes on this machine, one per GPU.", at_least=1)
    batch_gpu: int | Literal["auto"] | None = setting(
        None,
        "Micro-batch size per process; None: batch size / GPUs; auto: the largest that fits.",
        at_least=1,
    )
    device: str | None = setting(None, "Device: cpu, cuda or cuda:N; None: a GPU if available.", auto=True)
    workers: int | None = setting(
        None, "Number of data loader processes per GPU; None: 2, or 0 on a CPU.", auto=True, at_least=0, at_most=1024
    )
    data_on_gpu: bool | None = setting(
        None, "Keep the decoded dataset in device memory; None: on a GPU, if it is at most 2 GiB.", auto=True
    )
    nan: str = setting(
        "stop",
        "Response to non-finite values: stop at the next tick, or skip the affected updates.",
        choices=("stop", "skip"),
    )
    recompute: bool = setting(
        False, "Gradient checkpointing: recompute activations in the backward pass (less memory, more time)."
    )
    compile: bool = setting(False, "Use torch.compile for networks whose second derivatives are not needed.")
    graphs: bool | None = setting(
        None, "Capture each phase as a CUDA graph; None: on a GPU, for images of up to 64 pixels per side.", auto=True
    )
    kernels: str = setting(
        "all",
        "This project's GPU kernels: all, the CUDA operators without the fused encoder kernels, or none.",
        choices=KERNELS,
    )
    attention: str = setting(
        "auto",
        "Attention kernels; auto: PyTorch's choice, which also handles inputs that others do not support.",
        choices=("auto", *BACKENDS),
    )
    cudnn_benchmark: bool = setting(True, "Let cuDNN benchmark its convolution algorithms and use the fastest.")
    timeout: float = setting(
        1800, "Seconds to wait for a stalled process before aborting the run.", above=0, at_most=100_000_000
    )
    deterministic: bool = setting(
        False, "Use deterministic algorithms only, for bit-identical results in repeated runs; slower."
    )
    profile_steps: int = setting(0, "Number of training steps to profile in a Chrome trace; 0: no trace.", at_least=0)

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.keep_best and self.metrics == () and not self.tick_metrics:
            raise ConfigError("keep_best", True, "needs a metric: give --metrics or run.tick_metrics")
        if self.data_on_gpu and self.workers:
            raise ConfigError("workers", self.workers, "cannot be combined with run.data_on_gpu: give one of the two")
        if not re.fullmatch(r"[\w.-]{0,60}", self.desc):
            raise ConfigError("desc", self.desc, "at most 60 letters, digits and -_. are allowed")
        for name in ("graphs", "compile"):
            if getattr(self, name) and self.recompute:
                problem = "cannot be combined with gradient checkpointing: omit --grad-checkpoint"
                raise ConfigError(name, True, problem)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Complete configuration of a training run; `resolve` replaces None with values for the dataset and the machine."""

    preset: str = setting(help="Name of the preset that the configuration started from.")
    seed: int = setting(0, "Random seed of weights, latents, data order and noise.", at_least=0, at_most=2**63 - 1)
    data: DatasetConfig = setting(help="Training images.", default_factory=DatasetConfig)
    generator: GeneratorConfig = setting(help="Generator.", default_factory=StyleformerConfig, families=GENERATORS)
    discriminator: DiscriminatorConfig = setting(
        help="Discriminator.", default_factory=StyleGAN2DiscriminatorConfig, families=DISCRIMINATORS
    )
    augment: AugmentConfig = setting(help="Augmentation.", default_factory=AugmentConfig)
    loss: LossConfig = setting(help="Objective and regularisers.", default_factory=LossConfig)
    g_optimizer: AdamConfig = setting(help="Optimizer of the generator.", default_factory=AdamConfig)
    d_optimizer: AdamConfig = setting(help="Optimizer of the discriminator.", default_factory=AdamConfig)
    ema: EMAConfig = setting(help="Moving average of the generator's weights.", default_factory=EMAConfig)
    batch_size: int | None = setting(
        None,
        "Total batch size over all GPUs; None: from the resolution and the number of GPUs.",
        auto=True,
        at_least=1,
    )
    w_avg_rate: float = setting(0.005, "Weight of the batch mean of w in each update of w_avg.", at_least=0, at_most=1)
    freeze_layers: int = setting(
        0, "Freeze-D: number of frozen layers of D, counted from the image.", at_least=0, note="0 trains all of D"
    )
    precision: Precision | None = setting(
        None, "Precision of activations; None: bf16 on a GPU that supports it, else fp32.", auto=True
    )
    reduced_from: int = setting(
        0,
        "Longer side of the smallest grid computed in `precision`; smaller grids use float32.",
        at_least=0,
        note="0 applies `precision` to all grids",
    )
    allow_tf32: bool = setting(False, "Allow TF32 in float32 matrix products and convolutions.")
    channels_last: bool | None = setting(
        None, "Channels-last layout of weights and images; None: on a GPU, unless precision is fp32.", auto=True
    )
    origin: Origin = setting(help="Origin of the initial weights.", default_factory=Origin)
    run: RunConfig = setting(help="Duration, device, micro-batches, logging.", default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Properties of the training images and the machine that `resolve` depends on."""

    img_shape: tuple[int, int, int]
    c_dim: int
    is_raw: bool = False  # the images were not prepared by dataset_tool.py
    on_gpu: bool = False
    has_bf16: bool = False  # bfloat16 matrix units


def _presets() -> dict[str, TrainConfig]:
    auto = TrainConfig(
        preset="auto",
        generator=StyleformerConfig(**StyleformerConfig.AUTO),
        discriminator=StyleGAN2DiscriminatorConfig(**StyleGAN2DiscriminatorConfig.AUTO),
    )
    stylegan2 = TrainConfig(
        preset="stylegan2",
        generator=StyleGAN2Config(mapping_layers=8, resolutions=None),
        discriminator=StyleGAN2DiscriminatorConfig(mbstd_group_size=4),
        batch_size=32,
        g_optimizer=AdamConfig(lr=0.002),
        d_optimizer=AdamConfig(lr=0.002),
        loss=LossConfig(r1_gamma=10),
        ema=EMAConfig(kimg=10, rampup=None),
    )
    cifar = TrainConfig(
        preset="cifar",
        discriminator=StyleGAN2DiscriminatorConfig(architecture="orig", mbstd_group_size=32),
        batch_size=32,
        g_optimizer=AdamConfig(lr=0.0025),
        d_optimizer=AdamConfig(lr=0.0025),
        loss=LossConfig(r1_gamma=0.01, pl_weight=0, style_mixing=0),
        ema=EMAConfig(kimg=500, rampup=0.05),
        run=RunConfig(total_kimg=100_000),
    )
    return {
        "auto": auto,
        "stylegan2": stylegan2,
        "paper256": override(stylegan2, _paper("paper256", batch=64, mbstd=8, fmaps=0.5, lr=0.0025, gamma=1, ema=20)),
        "paper512": override(stylegan2, _paper("paper512", batch=64, mbstd=8, fmaps=1, lr=0.0025, gamma=0.5, ema=20)),
        "paper1024": override(stylegan2, _paper("paper1024", batch=32, mbstd=4, fmaps=1, lr=0.002, gamma=2, ema=10)),
        "cifar": cifar,
        "styleformer2": _styleformer2(cifar),
        "cifar-stylegan2": replace(
            cifar, preset="cifar-stylegan2", generator=StyleGAN2Config(resolutions=None), batch_size=64
        ),
        "cifar-large": override(cifar, _styleformer("cifar-large", (1024, 512, 512), (1, 3, 3))),
        "stl10-medium": override(cifar, _styleformer("stl10-medium", (1024, 256, 64), (1, 3, 3), base=(12, 12))),
        "celeba64-l": override(cifar, _styleformer("celeba64-l", (1024, 256, 64, 64), (1, 2, 1, 1), linformer=True)),
        "church128-l": override(
            cifar, _styleformer("church128-l", (1024, 256, 64, 64, 64), (1, 2, 1, 1, 1), linformer=True)
        ),
        "ablation-ffn": override(cifar, {"preset": "ablation-ffn", "generator.ffn": True}),
        "ablation-depth16": override(cifar, {"preset": "ablation-depth16", "generator.depth": 16}),
        "ablation-depth64": override(cifar, {"preset": "ablation-depth64", "generator.depth": 64}),
        "ablation-norm-after": override(cifar, {"preset": "ablation-norm-after", "generator.layernorm": "after"}),
        "ablation-no-style": override(cifar, {"preset": "ablation-no-style", "generator.style_attention": False}),
        "ablation-no-residual": override(cifar, {"preset": "ablation-no-residual", "generator.residual": False}),
        "styleformer-c256": _compositional(stylegan2),
        **{config.preset: config for config in _transgans()},
        **{config.preset: config for config in _r3gans()},
        **{config.preset: config for config in _alias_free(stylegan2, cifar)},
        "tiny": _tiny(),
    }


def _paper(name: str, *, batch: int, mbstd: int, fmaps: float, lr: float, gamma: float, ema: float) -> dict[str, Any]:
    """Options of StyleGAN2-ADA's configurations named paper*."""
    return {
        "preset": name,
        "batch_size": batch,
        "generator.channel_base": int(fmaps * 32768),
        "discriminator.mbstd_group_size": mbstd,
        "discriminator.channel_base": int(fmaps * 32768),
        "g_optimizer.lr": lr,
        "d_optimizer.lr": lr,
        "loss.r1_gamma": gamma,
        "ema.kimg": ema,
    }


def _styleformer(
    name: str,
    widths: tuple[int, ...],
    layers: tuple[int, ...],
    base: tuple[int, int] = (8, 8),
    linformer: bool = False,
) -> dict[str, Any]:
    """Models of the Styleformer paper. The Linformer models were trained with ADA's p limited to 0.7."""
    return {
        "preset": name,
        "generator.widths": widths,
        "generator.layers": layers,
        "generator.base": base,
        "generator.linformer": linformer,
        "augment.max_p": 0.7 if linformer else 1.0,
    }


def _styleformer2(cifar: TrainConfig) -> TrainConfig:
    """Styleformer2 in place of Styleformer, smaller latents and batches, and two D steps per G step."""
    generator = Styleformer2Config(z_dim=64, w_dim=128, **Styleformer2Config.AUTO)
    recipe = {"preset": "styleformer2", "batch_size": 8, "discriminator.mbstd_group_size": 8, "loss.n_critic": 2}
    return override(replace(cifar, generator=generator), recipe)


def _alias_free(stylegan2: TrainConfig, cifar: TrainConfig) -> list[TrainConfig]:
    """StyleGAN3's configurations T and R, and Styleformers with their input: alias-free (A) or on plain grids (F).

    StyleGAN3 has no path length regularisation, style mixing and noise. gamma is that of FFHQ at 256 pixels. The blur
    of R lasts 200 kimg at a batch size of 32.
    """
    recipe: dict[str, Any] = {"loss.r1_gamma": 2, "loss.pl_weight": 0, "loss.style_mixing": 0, "g_optimizer.lr": 0.0025}
    t = override(replace(stylegan2, preset="stylegan3-t", generator=StyleGAN3Config(**StyleGAN3Config.AUTO)), recipe)
    rotation = StyleGAN3Config(**StyleGAN3Config.AUTO, rotation=True, channel_max=1024)
    blur = AugmentConfig(blur=Schedule(10.0, 0.0, length=200_000))
    fourier = StyleformerConfig(**StyleformerConfig.AUTO, fourier_input=True)
    return [
        t,
        replace(t, preset="stylegan3-r", generator=rotation, augment=blur),
        replace(t, preset="styleformer-a", generator=StyleformerAConfig(**StyleformerAConfig.AUTO)),
        replace(cifar, preset="styleformer-f", generator=fourier),
    ]


def _compositional(stylegan2: TrainConfig) -> TrainConfig:
    """Styleformer-C for multi-object scenes such as CLEVR at 256x256, with the schedule of paper256.

    The published widths and schedule are unknown; these values are this project's choice.
    """
    paper256 = _paper("styleformer-c256", batch=64, mbstd=8, fmaps=0.5, lr=0.0025, gamma=1, ema=20)
    return override(stylegan2, {"generator.family": "styleformer-c", **paper256})


def _transgan(
    name: str,
    generator: TransGANConfig,
    discriminator: TransGANDiscriminatorConfig,
    *,
    augment: AugmentConfig,
    ema: EMAConfig,
    n_critic: int = 4,
    batch: int = 64,
) -> TrainConfig:
    """TransGAN's training configuration; the paper's models differ only in the arguments."""
    return TrainConfig(
        preset=name,
        data=DatasetConfig(mirror=True),
        generator=generator,
        discriminator=discriminator,
        augment=augment,
        loss=LossConfig(
            objective="wgangp-eps",
            n_critic=n_critic,
            g_batch_scale=2,
            r1_interval=None,
            pl_weight=0,
            pl_interval=None,
            style_mixing=0,
        ),
        g_optimizer=AdamConfig(lr=1e-4, clip_norm=5),
        d_optimizer=AdamConfig(lr=1e-4, clip_norm=5),
        ema=ema,
        batch_size=batch,
    )


# TransGAN's augmentation: from its slides, and from its scripts for CIFAR-10, for larger images, and for CelebA-HQ.
FROM_SLIDES = AugmentConfig(mode="diffaug")
SCRIPTS = replace(FROM_SLIDES, translation=0.2, cutout_p=0.3)
SCRIPTS_LARGE = replace(SCRIPTS, policy=("translation", "erase", "color"))
SCRIPTS_CELEBAHQ = replace(
    SCRIPTS_LARGE, policy=("filter", "translation", "erase", "color", "hue"), filter_p=0.25, hue_p=0.5
)


def _transgans() -> list[TrainConfig]:
    """TransGAN's models with the settings of the released scripts; the CelebA models follow the slides on the paper.

    docs/transgan.md lists which details are published and which are inferred.
    """
    G, D = TransGANConfig, TransGANDiscriminatorConfig
    widths, layers = (1024, 1024, 1024, 256, 64, 16), (5, 4, 4, 4, 4, 4)  # from 8x8 to 256x256
    small = D(norm="token", attention_noise=True)
    large = D(img_size=(256, 256), patch=4, widths=(288, 48, 48), layers=(3, 3, 4), local_layers=(2, 0, 0))
    finer = replace(large, patch=2, overlap=True, widths=(96, 96, 192), local_layers=(3, 2, 0), window=4)
    long = EMAConfig(kimg=500, rampup=None)
    short = EMAConfig(kimg=35.4, rampup=None)  # 0.995 per step of G, i.e. per 4 x 64 images
    return [
        _transgan(
            "transgan-cifar",
            G(z_dim=256, w_dim=256, norm="layer"),
            replace(small, norm="layer"),
            augment=SCRIPTS,
            ema=replace(long, rampup=0.1),
        ),
        _transgan(
            "transgan-stl10",
            G(base=(12, 12), layers=(7, 5, 3), attention="full"),
            replace(small, img_size=(48, 48)),
            augment=SCRIPTS_LARGE,
            ema=replace(long, rampup=0.05),
            n_critic=5,
            batch=32,
        ),
        _transgan(
            "transgan-celeba64",
            G(widths=widths[:4], layers=layers[:4]),
            replace(large, img_size=(64, 64), patch=2),
            augment=FROM_SLIDES,
            ema=long,
        ),
        _transgan(
            "transgan-celeba128",
            G(widths=widths[:5], layers=layers[:5]),
            replace(large, img_size=(128, 128), patch=2),
            augment=FROM_SLIDES,
            ema=long,
        ),
        _transgan(
            "transgan-church256",
            G(widths=widths, layers=layers, attention_noise=True),
            large,
            augment=SCRIPTS_LARGE,
            ema=short,
        ),
        _transgan(
            "transgan-celebahq256",
            G(widths=widths, layers=(0, *layers[1:]), latent_tokens=64, antialias=2, attention_noise=True),
            replace(finer, position="absolute"),
            augment=SCRIPTS_CELEBAHQ,
            ema=short,
        ),
    ]


def _r3gan(
    name: str,
    widths: tuple[int, ...],
    *,
    group_width: int = 16,
    batch: int,
    total: int,
    burn_in: int,
    gamma: tuple[float, float],
    ema: float,
    p: float | None,
    lr: tuple[float, float] = (2e-4, 5e-5),
    labels: bool = False,
    tick: float = 4,
) -> TrainConfig:
    """R3GAN's training configuration (table 9); `total`, `burn_in` and `ema` are in millions of images.

    All schedules are cosines over the burn-in: of lr, gamma and beta2, and from 0 of p and the half-life of the EMA.
    """

    def burn(start: float, end: float) -> Schedule:
        return Schedule(start, end, length=burn_in * 1_000_000)

    side = 4 << (len(widths) - 1)
    adam = AdamConfig(lr=burn(*lr) if lr[0] != lr[1] else lr[0], beta2=burn(0.9, 0.99))
    shape: dict[str, Any] = {"widths": widths, "layers": (2,) * len(widths), "group_width": group_width}
    augment = AugmentConfig(mode="noaug")
    if p is not None:
        augment = AugmentConfig(mode="fixed", pipe="bgcc", color_strength=0.5, p=burn(0.0, p))
    return TrainConfig(
        preset=name,
        data=DatasetConfig(mirror=p is not None, use_labels=labels),
        generator=R3GANConfig(**shape),
        discriminator=R3GANDiscriminatorConfig(img_size=(side, side), **shape),
        augment=augment,
        loss=LossConfig(
            objective="relativistic",
            r1_gamma=burn(*gamma),
            r1_interval=None,
            pl_weight=0,
            pl_interval=None,
            style_mixing=0,
            fresh_reals=True,
            d_first=True,
        ),
        g_optimizer=adam,
        d_optimizer=adam,
        ema=EMAConfig(kimg=burn(0.0, 1000 * ema), rampup=None),
        batch_size=batch,
        reduced_from=max(8, side // 8),
        run=RunConfig(total_kimg=1000 * total, tick_kimg=tick),
    )


def _r3gans() -> list[TrainConfig]:
    """R3GAN's models (Huang et al. 2024, table 9); docs/r3gan.md lists which details are inferred."""
    base = (768, 768, 768, 768)  # from 4x4 to 32x32
    faces: dict[str, Any] = {"batch": 256, "burn_in": 20, "ema": 0.5, "p": 0.3}
    imagenet: dict[str, Any] = {"group_width": 32, "batch": 4096, "total": 1000, "burn_in": 200, "ema": 50.0}
    imagenet |= {"labels": True, "tick": 40}
    return [
        _r3gan(
            "r3gan-cifar", base, batch=512, total=250, burn_in=20, gamma=(0.05, 0.005), ema=5.0, p=0.55, labels=True
        ),
        _r3gan(
            "r3gan-stackedmnist",
            base,
            batch=512,
            total=10,
            burn_in=2,
            gamma=(1.0, 0.1),
            ema=0.5,
            p=None,
            lr=(2e-4, 2e-4),
        ),
        _r3gan("r3gan-ffhq64", (*base, 384), total=100, gamma=(2.0, 0.2), **faces),
        _r3gan("r3gan-ffhq256", (*base, 384, 192, 96), total=200, gamma=(150.0, 15.0), **faces),
        _r3gan("r3gan-imagenet32", (1536,) * 4, gamma=(0.5, 0.05), p=0.5, **imagenet),
        _r3gan("r3gan-imagenet64", (1536,) * 5, gamma=(1.0, 0.1), p=0.4, **imagenet),
    ]


def _tiny() -> TrainConfig:
    """Small networks that learn simple scenes at 32x32 in minutes on two CPU cores.

    The small batch and the learning rates trade stability for speed. D has a higher learning rate because its weights
    have unit variance (equalised learning rate), whereas G stores small unscaled weights.
    """
    return TrainConfig(
        preset="tiny",
        generator=StyleformerConfig(
            z_dim=64, w_dim=64, widths=(128, 64, 64), layers=(1, 1, 1), linformer=True, linformer_k=32
        ),
        discriminator=StyleGAN2DiscriminatorConfig(channel_base=512, channel_max=128),
        augment=AugmentConfig(pipe="blit", ada_kimg=20),
        loss=LossConfig(r1_gamma=0.5, pl_weight=0, style_mixing=0),
        g_optimizer=AdamConfig(lr=0.001),
        d_optimizer=AdamConfig(lr=0.006),
        ema=EMAConfig(kimg=0.5, rampup=0.05),
        batch_size=8,
        run=RunConfig(total_kimg=12, tick_kimg=1, snapshot_ticks=4),
    )


PRESETS: Mapping[str, TrainConfig] = _presets()

# Defaults of transfer learning (Karras et al. 2020b); the user's options take precedence.
TRANSFER_LEARNING: Mapping[str, Any] = {"augment.ada_kimg": 100.0, "ema.rampup": None}


def apply_options(preset: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """Return a preset with a user's options applied, {config path: value}.

    Preset settings that an option rules out are dropped: R1 and others that the --loss objective does not use, path
    length and style mixing if the --gen generator has no styles, probability and policy if the --aug mode changes,
    paired augmentation without pairs or augmentation. Options are never dropped: an option without effect raises
    ConfigError.
    """
    if "loss.objective" in values:
        preset = replace(preset, loss=preset.loss.with_objective(values["loss.objective"]))
    if values.get("augment.mode", preset.augment.mode) != preset.augment.mode:
        preset = replace(preset, augment=replace(preset.augment, mode="noaug", p=None, policy=None))
    chosen = override(preset, values)
    if chosen.augment.paired and "augment.paired" not in values and _pairing_problem(chosen):
        chosen = override(chosen, {"augment.paired": False})
    _check_augment_options(chosen.augment, values)
    _check_intervals(chosen, values)
    if "generator.family" in values and not _has_styles(chosen.generator):
        styles = {"loss.pl_weight": 0.0, "loss.style_mixing": 0.0}
        chosen = override(chosen, {path: value for path, value in styles.items() if path not in values})
    return chosen


def _check_intervals(config: TrainConfig, values: Mapping[str, Any]) -> None:
    """Raise ConfigError if a regulariser has a weight but no interval, so its phase would never run."""
    intervals = {"pl_weight": "pl_interval"} if _has_styles(config.generator) else {}
    intervals |= {"r1_gamma": "r1_interval"} if config.loss.objective in LAZY_R1 else {}
    for weight, interval in intervals.items():
        if values.get(f"loss.{weight}") and getattr(config.loss, interval) is None:
            problem = (
                f"has no effect without an interval, which --cfg={config.preset} does not set: give --set "
                f"loss.{interval}=INT too"
            )
            raise ConfigError(f"loss.{weight}", values[f"loss.{weight}"], problem)


def _check_augment_options(augment: AugmentConfig, values: Mapping[str, Any]) -> None:
    """Raise ConfigError for options that the augmentation mode or its policy does not use."""
    policy = augment.policy or DEFAULT_POLICY
    for path, value in values.items():
        part, _, name = path.partition(".")
        if part == "augment" and name not in ("mode", *MODE_FIELDS[augment.mode]):
            modes = [other for other, fields in MODE_FIELDS.items() if name in fields]
            problem = f"--aug={augment.mode} does not use it: omit it, or give --aug={modes[0]}"
            raise ConfigError(path, value, problem)
        if path == "augment.color_strength" and "color" not in PIPES[augment.pipe]:
            problem = f"has no effect on augment.pipe={augment.pipe}, which lacks colour transforms"
            raise ConfigError(path, value, problem)
        transforms = [transform for transform, parameter in PARAMETERS.items() if path == f"augment.{parameter}"]
        if transforms and not set(transforms) & set(policy):
            problem = f"has no effect on augment.policy={','.join(policy)}, which lacks {' and '.join(transforms)}"
            raise ConfigError(path, value, problem)


def _pairing_problem(config: TrainConfig) -> str | None:
    """Return the reason why augment.paired has no effect, if any."""
    if config.loss.objective != "relativistic":
        return "only --loss=relativistic compares pairs of images; omit it"
    identity = config.augment.identity
    return f"{identity} does not transform images; omit it" if identity else None


def _has_styles(generator: GeneratorConfig) -> bool:
    try:
        return generator.num_ws > 1
    except ConfigError:  # num_ws is not yet derived from the image size
        return True


def resolve(config: TrainConfig, env: Environment) -> TrainConfig:
    """Replace None with values for the dataset and the machine, and check the configuration for contradictions.

    Raises ConfigError naming the field, e.g. for an unsupported image size or a batch that cannot be divided equally.
    """
    if config.run.graphs and not env.on_gpu:
        raise ConfigError("run.graphs", True, "CUDA graphs need a GPU; omit it")
    channels, height, width = env.img_shape
    resolution = max(height, width)
    num_gpus = config.run.num_gpus
    batch_size = config.batch_size or max(min(num_gpus * min(4096 // resolution, 32), 64), num_gpus)
    share = -(-batch_size // num_gpus)
    is_auto = config.run.batch_gpu == "auto"
    batch_gpu = share if is_auto else config.run.batch_gpu or share
    lr = 0.002 if resolution >= 1024 else 0.0025
    precision = config.precision or ("bf16" if env.on_gpu and env.has_bf16 else "fp32")

    values: dict[str, Any] = {
        "batch_size": batch_size,
        "precision": precision,
        "channels_last": env.on_gpu and precision != "fp32" if config.channels_last is None else config.channels_last,
        "run.batch_gpu": batch_gpu,
        "run.graphs": _chooses_graphs(config.run, env) if config.run.graphs is None else config.run.graphs,
        "generator.img_channels": channels,
        "generator.c_dim": env.c_dim,
        "discriminator.c_dim": env.c_dim,
        "g_optimizer.lr": config.g_optimizer.lr or lr,
        "d_optimizer.lr": config.d_optimizer.lr or lr,
        "ema.kimg": batch_size * 10 / 32 if config.ema.kimg is None else config.ema.kimg,
    }
    if config.augment.mode == "diffaug" and config.augment.policy is None:
        values["augment.policy"] = DEFAULT_POLICY
    resolved = override(config, values)
    resolved = replace(resolved, loss=resolved.loss.fit(resolution, batch_size, precision))
    resolved = _fit_networks(resolved, env)
    # The number of RGB heads may depend on the image size.
    resolved = override(resolved, {"discriminator.img_channels": channels * resolved.generator.num_rgb_heads})
    if is_auto:
        resolved = override(resolved, {"run.batch_gpu": next(iter(micro_batches(resolved)), batch_gpu)})
    _check_batches(resolved)
    _check_styles(resolved)
    _check_augmentation(resolved)
    _check_slicing(resolved)
    _check_holdout(resolved)
    _check_parts(resolved, env)
    return resolved


def _fit_networks(config: TrainConfig, env: Environment) -> TrainConfig:
    """Fill in the settings of both networks that depend on the image size.

    Raises ConfigError naming the option that does not fit the images, or data.path if no option is the cause.
    """
    try:
        return image_size.fit(config, *env.img_shape[1:])
    except ConfigError as error:
        if config.preset not in PRESETS:  # written by another version or project
            raise
        raise image_size.explain(error, config, PRESETS, env.img_shape[1:], is_raw=env.is_raw) from None


def fitting_size(config: TrainConfig, sizes: Sizes) -> Size | None:
    """Return the best (width, height) that the networks support for images of these sizes, or None."""
    return next(iter(image_size.fitting_sizes(config, sizes)), None)


def _chooses_graphs(run: RunConfig, env: Environment) -> bool:
    return env.on_gpu and max(env.img_shape[1:]) <= GRAPHS_SIDE and not run.recompute


def micro_batches(config: TrainConfig) -> list[int]:
    """Return the micro-batch sizes that --batch-gpu=auto can choose from, largest first.

    Each size divides a process's share of the batch and is a multiple of the minibatch-std group size.
    """
    assert config.batch_size is not None
    share = config.batch_size // config.run.num_gpus
    group = max(min(config.discriminator.group_size, share), 1)
    sizes = []
    for size in range(share // group * group, 0, -group):
        try:
            _check_batches(override(config, {"run.batch_gpu": size}))
            sizes.append(size)
        except ConfigError:
            continue
    return sizes


def _check_batches(config: TrainConfig) -> None:
    batch_gpu, gpus = config.run.batch_gpu, config.run.num_gpus
    assert config.batch_size is not None
    assert isinstance(batch_gpu, int)
    per_round = batch_gpu * gpus
    if config.batch_size % per_round:
        raise ConfigError(
            "batch_size",
            config.batch_size,
            f"must be a multiple of {per_round} ({gpus} GPUs x {batch_gpu} images at a time); "
            f"choose --batch={-(-config.batch_size // per_round) * per_round} or another --batch-gpu",
        )
    for count in {batch_gpu, batch_gpu * config.loss.g_batch_scale}:
        group = min(config.discriminator.group_size, count)
        if group and count % group:
            images = (
                "" if count == batch_gpu else f"with loss.g_batch_scale={config.loss.g_batch_scale}, {count} images "
            )
            problem = f"{images}cannot be cut into minibatch-std groups of {group}; choose a multiple of {group}"
            raise ConfigError("batch_gpu", batch_gpu, problem)
    if config.loss.pl_weight and config.loss.pl_interval and batch_gpu < 2:
        raise ConfigError(
            "run.batch_gpu",
            batch_gpu,
            "path length uses half of the micro-batch: give at least 2, or turn path length off with --pl-weight=0",
        )
    _check_estimate(config)


def _check_estimate(config: TrainConfig) -> None:
    """Raise ConfigError if the finite differences of loss.penalty=estimate have no images or would not compare D's."""
    estimate = config.loss.estimate
    if estimate is None:
        return
    if config.discriminator.has_noise:
        problem = (
            "differences of logits would contain the noise of this discriminator's attention: omit it, or give --set "
            "discriminator.attention_noise=0"
        )
        raise ConfigError("loss.penalty", config.loss.penalty, problem)
    assert isinstance(config.run.batch_gpu, int)
    members = max(min(config.discriminator.group_size, config.run.batch_gpu), 1)
    groups = config.run.batch_gpu // members
    if not estimate.count(groups):
        images = f"{groups} minibatch-std groups of {members} images" if members > 1 else f"{groups} images"
        problem = f"leaves none of the {images} of a micro-batch: give at least {ceil(1000 / groups) / 1000:g}"
        problem += ", or a smaller --mbstd (0: no groups)" if members > 1 else ""
        raise ConfigError("loss.penalty_share", estimate.share, problem)


def _check_augmentation(config: TrainConfig) -> None:
    problem = _pairing_problem(config)
    if config.augment.paired and problem:
        raise ConfigError("augment.paired", True, problem)
    mode = config.augment.mode
    for name in ("bcr_real", "bcr_fake"):
        if getattr(config.loss, name) and config.augment.identity:
            problem = f"compares images with their augmentation, and {config.augment.identity} has none; omit it"
            raise ConfigError(f"loss.{name}", getattr(config.loss, name), problem)
    if mode == "apa" and config.loss.objective == "wgangp-eps":
        problem = "only scales the loss of wgangp-eps by 1 - p: give another --loss, or --aug=ada"
        raise ConfigError("augment.mode", mode, problem)


def _check_slicing(config: TrainConfig) -> None:
    if config.discriminator.is_slicing and config.loss.objective not in SLICING:
        problem = f"needs --loss={' or '.join(SLICING)}, whose logits have a sign of their own; omit it"
        raise ConfigError("discriminator.san", True, problem)


def _check_styles(config: TrainConfig) -> None:
    for name, remedy in (("pl_weight", "--pl-weight=0"), ("style_mixing", "--mixing=0")):
        value = getattr(config.loss, name)
        if value and config.generator.num_ws == 1:
            raise ConfigError(f"loss.{name}", value, f"this generator has no styles per layer: give {remedy}")


def _check_holdout(config: TrainConfig) -> None:
    assert isinstance(config.run.batch_gpu, int)
    per_round = config.run.batch_gpu * config.run.num_gpus
    if 0 < config.data.holdout < per_round:
        raise ConfigError(
            "data.holdout",
            config.data.holdout,
            f"D evaluates held-out images in whole batches: hold out at least {per_round} (--batch-gpu times --gpus)",
        )


def _check_parts(config: TrainConfig, env: Environment) -> None:
    pipe = AugmentPipe(config.augment, env.img_shape)  # raises ConfigError for images that it does not support
    if config.run.deterministic and env.on_gpu and not all(stage.is_deterministic for stage in pipe.stages):
        problem = (
            "some augmentations are not deterministic on a GPU: give --aug=noaug, --augpipe=color, noise or cutout, or "
            "--aug=diffaug without filter"
        )
        raise ConfigError("run.deterministic", True, problem)
    with OnMeta():
        num_layers = len(config.discriminator.build().layers_from_image())
    if config.freeze_layers > num_layers:
        problem = f"this discriminator has {num_layers} layers that can be frozen"
        raise ConfigError("freeze_layers", config.freeze_layers, problem)


def schedules(config: Any) -> dict[str, Schedule]:
    """Return the fields of a configuration that have a schedule, {config path: schedule}."""
    found: dict[str, Schedule] = {}
    for name in field_names(config):
        value = getattr(config, name)
        if is_config(value):
            found |= {f"{name}.{path}": schedule for path, schedule in schedules(value).items()}
        elif isinstance(value, Schedule):
            found[name] = value
    return found


# Fields missing from the files of earlier versions, with the values that reproduce the behaviour of those versions.
ADDED_FIELDS: Mapping[str, Any] = {
    "precision": "fp32",
    "reduced_from": 0,
    "run.data_on_gpu": False,
    "run.nan": "stop",
    "run.recompute": False,
    "run.compile": False,
    "run.graphs": False,
    "run.deterministic": False,
    "run.kernels": "all",
    "run.attention": "auto",
    "run.timeout": 1800,
    "run.keep_last": 2,
    "run.keep_every": None,
    "run.keep_best": False,
    "run.metrics_every": None,
    "run.metrics_first": False,
    "run.tick_metrics": (),
    "run.log": None,
    "run.detectors": (),
    "run.desc": "",
    "data.holdout": 0,
    "loss.objective": "logistic",
    "loss.n_critic": 1,
    "loss.g_batch_scale": 1,
    "loss.gp_weight": None,
    "loss.drift_weight": None,
    "loss.penalty": "exact",
    "loss.penalty_share": None,
    "loss.penalty_sigma": None,
    "loss.centring": 0.0,
    "loss.bcr_real": 0.0,
    "loss.bcr_fake": 0.0,
    "loss.lecam": 0.0,
    "loss.fresh_reals": False,
    "loss.d_first": False,
    "generator.ffn": False,
    "generator.layernorm": "before",
    "generator.style_attention": True,
    "generator.residual": True,
    "generator.fourier_input": False,
    "generator.attention_noise": False,
    "generator.mapping_lr": 0.01,
    "generator.noise": True,
    "discriminator.attention_noise": False,
    "augment.color_strength": 1.0,
    "augment.policy": None,
    "augment.translation": 0.125,
    "augment.cutout_p": 1.0,
    "augment.filter_p": 1.0,
    "augment.hue_p": 1.0,
    "augment.paired": False,
    "augment.blur": 0.0,
    "g_optimizer.clip_norm": None,
    "d_optimizer.clip_norm": None,
    "discriminator.cmap_dim": None,
    "ema.profiles": (),
    "discriminator.san": False,
    "origin": Origin(),
}


def read_config(data: Any) -> TrainConfig:
    """Return the configuration in a file of this or an earlier version. Raises ConfigError for invalid data."""
    if isinstance(data, dict):
        data = {name: {**part} if isinstance(part, dict) else part for name, part in data.items()}
        for path, value in ADDED_FIELDS.items():
            *parents, name = path.split(".")
            part = data.get(parents[0]) if parents else data
            if isinstance(part, dict) and (not parents or _has_field(parents[0], part, name)):
                part.setdefault(name, to_json(value) if is_config(value) else value)
    return from_json(TrainConfig, data)


def _has_field(part: str, data: Mapping[str, Any], name: str) -> bool:
    """Return whether the configuration class of a part of TrainConfig, chosen by its family, has a field `name`."""
    families = next(field.metadata.get("families") for field in fields(TrainConfig) if field.name == part)
    family = data.get("family")
    if not families or not isinstance(family, str) or family not in families:
        return True  # from_json rejects an unknown family
    return name in field_names(families[family])
