"""Train a GAN: options -> TrainConfig -> Trainer on one or several processes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

import dnnlib.cli
import metrics.registry
from dnnlib.cli import IntList, NameList, Size, option, switch
from dnnlib.config import ConfigError, UserError, differences, override, to_json
from dnnlib.util import TeeLog, write_atomically
from torch_utils import distributed
from torch_utils.misc import count_parameters, module_summary, tune_allocator
from training import hooks
from training.config import PRESETS, TRANSFER_LEARNING, DatasetInfo, TrainConfig, resolve, same_training
from training.dataset import ImageDataset
from training.snapshot import copy_weights, load_network
from training.training_loop import Trainer


@dataclass(frozen=True)
class Start:
    """Where a run begins: its folder, the run to go on from if any, the snapshot to transfer from if any."""

    run_dir: Path
    resumes: bool
    snapshot: Path | None


# fmt: off
OPTIONS = (
    # Where and what
    option("--outdir", field=None, metavar="DIR", help="Folder in which the run gets a numbered folder of its own."),
    option("--data", field="data.path", metavar="PATH", help="Training images: zip or folder made by dataset_tool.py."),
    option("--cfg", field=None, type=click.Choice(list(PRESETS)), default="auto", show_default=True, help="Preset."),
    option("--gpus", field="run.num_gpus", type=int, metavar="INT", help="Processes on this machine, one per GPU. [1]"),
    option("--device", field="run.device", metavar="NAME", help="cpu, cuda or cuda:N. [a GPU if there is one]"),
    option("--resume", field=None, metavar="latest|DIR|PKL",
           help="Go on with the newest run of this configuration in --outdir, or with the run in a folder; or "
                "start from the weights of a snapshot (transfer learning)."),
    option("--seed", field="seed", type=int, metavar="INT", help="Seed of weights, latents, data order, noise. [0]"),
    option("-n", "--dry-run", field=None, is_flag=True,
           help="Print the resolved options and parameter counts; write nothing."),
    # Data
    switch("--cond", field="data.use_labels", help="Condition on the labels of the data set."),
    option("--subset", field="data.max_images", type=int, metavar="INT",
           help="Train with a random subset of so many images."),
    switch("--mirror", field="data.mirror", help="Also show every image flipped left to right."),
    option("--workers", field="run.workers", type=int, metavar="INT",
           help="Processes that decode images, per GPU. [2; 0 on a CPU]"),
    # How long and how loud
    option("--kimg", field="run.total_kimg", type=float, metavar="KIMG",
           help="Length of the training in thousands of real images."),
    option("--tick", field="run.tick_kimg", type=float, metavar="KIMG",
           help="Progress and statistics every so many kimg. [4]"),
    option("--snap", field="run.snapshot_ticks", type=int, metavar="TICKS",
           help="Snapshots, pictures, metrics every so many ticks. [50]"),
    option("--metrics", field="run.metrics", type=NameList(),
           help="Metrics at every snapshot, or none. [fid50k_full or swd]"),
    option("--profile", field="run.profile_steps", type=int, metavar="STEPS",
           help="Write a Chrome trace of so many steps."),
    # Training
    option("--batch", field="batch_size", type=int, metavar="INT", help="Images per step, over all GPUs."),
    option("--batch-gpu", field="batch_gpu", type=int, metavar="INT",
           help="Images at a time per GPU; gradients accumulate. [batch/gpus]"),
    option("--glr", field="g_optimizer.lr", type=float, metavar="FLOAT", help="Learning rate of the generator."),
    option("--dlr", field="d_optimizer.lr", type=float, metavar="FLOAT", help="Learning rate of the discriminator."),
    option("--gamma", field="loss.r1_gamma", type=float, metavar="FLOAT", help="Weight of R1."),
    option("--r1-interval", field="loss.r1_interval", type=int, metavar="STEPS", help="Steps between R1 phases. [16]"),
    option("--pl-weight", field="loss.pl_weight", type=float, metavar="FLOAT", help="Weight of path length, 0 = off."),
    option("--pl-interval", field="loss.pl_interval", type=int, metavar="STEPS",
           help="Steps between path-length phases. [4]"),
    option("--mixing", field="loss.style_mixing", type=float, metavar="0..1", help="Probability of style mixing."),
    option("--ema-kimg", field="ema.kimg", type=float, metavar="KIMG", help="Half-life of the averaged generator."),
    option("--ema-rampup", field="ema.rampup", type=float, metavar="FLOAT",
           help="Its ramp-up, as a share of the images so far."),
    option("--freezed", field="freeze_layers", type=int, metavar="INT",
           help="Freeze-D: layers of D that keep their weights. [0]"),
    # Augmentation
    option("--aug", field="augment.mode", type=click.Choice(["noaug", "ada", "fixed"]), help="Augmentation. [ada]"),
    option("--p", field="augment.p", type=float, metavar="0..1", help="Probability, for --aug=fixed."),
    option("--target", field="augment.target", type=float, metavar="0..1",
           help="Target of ADA: mean sign of D(real). [0.6]"),
    option("--augpipe", field="augment.pipe", metavar="NAME",
           help="blit, geom, color, filter, noise, cutout, bg, bgc, bgcf, bgcfn or bgcfnc. [bgc]"),
    option("--ada-kimg", field="augment.ada_kimg", type=float, metavar="KIMG",
           help="In how many kimg ADA's p can move by 1. [500]"),
    option("--max-p", field="augment.max_p", type=float, metavar="0..1", help="Upper bound of ADA's p."),
    # Generator
    option("--g_dict", field="generator.widths", type=IntList(), help="Hidden size per resolution, lowest first."),
    option("--num_layers", field="generator.layers", type=IntList(), help="Encoder blocks per resolution."),
    option("--base", field="generator.base", type=Size(), help="Grid that the generator starts from: 8 or 8x12. [8]"),
    option("--depth", field="generator.depth", type=int, metavar="INT", help="Channels per attention head. [32]"),
    option("--minimum_head", field="generator.minimum_head", type=int, metavar="INT",
           help="Least number of heads. [1]"),
    switch("--linformer", field="generator.linformer", help="Linformer attention where there are many tokens."),
    option("--linformer-k", field="generator.linformer_k", type=int, metavar="INT",
           help="Tokens that keys and values are projected to. [256]"),
    option("--linformer-tokens", field="generator.linformer_min_tokens", type=int, metavar="INT",
           help="Tokens from which on it applies. [1024]"),
    option("--z-dim", field="generator.z_dim", type=int, metavar="INT", help="Size of the latent z. [512]"),
    option("--w-dim", field="generator.w_dim", type=int, metavar="INT", help="Size of the style w. [512]"),
    option("--map-depth", field="generator.mapping_layers", type=int, metavar="INT",
           help="Layers of the mapping network."),
    # Discriminator
    option("--d-arch", field="discriminator.architecture", type=click.Choice(["orig", "skip", "resnet"]),
           help="Architecture. [resnet]"),
    option("--cbase", field="discriminator.channel_base", type=int, metavar="INT", help="Channels of D x resolution."),
    option("--cmax", field="discriminator.channel_max", type=int, metavar="INT",
           help="Upper bound of D's channels. [512]"),
    option("--mbstd", field="discriminator.mbstd_group_size", type=int, metavar="INT",
           help="Group of minibatch-std, 0 = off."),
    # Arithmetic
    switch("--fp32", field=None, help="Leave activations unclamped, as float32 permits."),
    switch("--nhwc", field="channels_last", help="Channels-last memory layout."),
    switch("--allow-tf32", field="allow_tf32", help="TF32 matrix units for float32."),
    switch("--nobench", field=None, help="Do not let cuDNN try out its algorithms."),
)
# fmt: on


@click.command(cls=dnnlib.cli.Script, context_settings={"max_content_width": 110, "show_default": False})
@dnnlib.cli.with_options(OPTIONS)
@click.pass_context
def main(context: click.Context, **options: Any) -> None:
    """Train a Styleformer against a StyleGAN2 discriminator under adaptive augmentation.

    What is not given comes from the preset (--cfg); [brackets] show what most presets say.

    \b
    python train.py --outdir=runs --data=mydata.zip --gpus=1 --batch=32 --cfg=cifar \\
        --g_dict=256,64,16 --num_layers=1,2,2 --depth=32
    """
    for name in ("data.path", "outdir"):
        _require(context, name)
    resume = options["resume"]
    config = _requested_config(context, transfer=resume is not None and Path(resume).is_file())
    dataset = ImageDataset(config.data)
    config = resolve(config, DatasetInfo(img_shape=dataset.img_shape, c_dim=dataset.c_dim))
    device = distributed.choose_device(config.run.device)
    if device.type == "cuda" and config.run.num_gpus > torch.cuda.device_count() * _num_nodes():
        raise ConfigError("run.num_gpus", config.run.num_gpus, f"this machine has {torch.cuda.device_count()} GPUs")
    metric_names, why = _metrics(config)
    config = override(config, {"run.metrics": metric_names})
    if options["dry_run"]:
        _print_plan(config, dataset)
        return
    if why and distributed.launched_rank() == 0:
        print(f"No --metrics given; {why}", flush=True)
    distributed.launch(
        train_worker, config.run.num_gpus, config, Path(options["outdir"]), resume, device_type=device.type
    )


def train_worker(config: TrainConfig, outdir: Path, resume: str | None) -> None:
    """What each process does: agree on the run's folder, build, load, train."""
    tune_allocator()
    device = distributed.choose_device(config.run.device)
    dataset = ImageDataset(config.data)
    start = distributed.from_main(lambda: _prepare_run(outdir, config, dataset, resume))
    torch.backends.cudnn.benchmark = config.run.cudnn_benchmark
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    with ExitStack() as stack:
        if distributed.is_main():
            stack.enter_context(TeeLog(start.run_dir / "log.txt"))
        _describe_data(dataset, config)
        trainer = Trainer(config, dataset, device)
        if start.resumes:
            state = hooks.load_latest(trainer, start.run_dir)
            _say(f"Resuming from {state} at kimg {trainer.state.nimg / 1000:g}")
        elif start.snapshot:
            _transfer(trainer, start.snapshot)
        _say(_summaries(trainer) + f"\nTraining on {device} in {start.run_dir}")
        trainer.hooks = build_hooks(trainer, start.run_dir)
        trainer.train()
        _say(f"Done: {start.run_dir}")


def build_hooks(trainer: Trainer, run_dir: Path) -> list[Any]:
    """Return what happens beside training, in the order in which it happens."""
    run = trainer.config.run
    chain: list[Any] = [hooks.Progress(), hooks.JsonLog(run_dir)]
    if distributed.is_main():
        try:
            chain.append(hooks.TensorBoardLog(run_dir))
        except ImportError:
            _say("TensorBoard events are not written: the package tensorboard is not installed")
    chain += [hooks.ImageGrids(run_dir, run.snapshot_ticks), hooks.Snapshots(run_dir, run.snapshot_ticks)]
    if run.profile_steps and distributed.is_main():
        chain.append(hooks.Profile(run_dir, run.profile_steps))
    if run.metrics:
        chain.append(hooks.Metrics(run_dir, run.snapshot_ticks, _evaluator(trainer, run_dir)))
    return chain


def _evaluator(trainer: Trainer, run_dir: Path) -> hooks.Evaluate:
    """Return the callable that computes the run's metrics for a generator, prints them and appends them to the run."""

    def evaluate(G_ema: Any, snapshot: Path, kimg: float) -> None:
        context = metrics.registry.MetricContext(G=G_ema, images=trainer.dataset, device=trainer.device)
        for name in trainer.config.run.metrics or ():
            result = metrics.registry.compute(name, context)
            if distributed.is_main():
                record = metrics.registry.result_to_json(
                    result,
                    snapshot=snapshot,
                    kimg=kimg,
                    data=trainer.config.data.path,
                    data_hash=trainer.dataset.content_hash,
                    mirror=trainer.config.data.mirror,
                )
                metrics.registry.append_result(run_dir, record)
                values = "  ".join(f"{key} {value:.3f}" for key, value in result.results.items())
                _say(
                    f"kimg {kimg:g}: {values}  ({result.seconds:.0f}s, {result.num_real} real, {result.num_fake} fake)"
                )

    return evaluate


def _require(context: click.Context, name: str) -> None:
    for parameter in context.command.params:
        if name in (parameter.name, getattr(parameter, "field", None)) and context.params[parameter.name or ""] is None:
            raise click.UsageError(f"missing option {parameter.opts[0]}", context)


def _requested_config(context: click.Context, transfer: bool) -> TrainConfig:
    """The preset, changed by transfer learning, the launcher and the options, in this order."""
    values = dnnlib.cli.config_values(context)
    if context.params["fp32"]:
        values |= {"generator.conv_clamp": None, "discriminator.conv_clamp": None}
    if context.params["nobench"]:
        values["run.cudnn_benchmark"] = False
    launched = distributed.launched_world_size()
    if launched is not None:
        if values.get("run.num_gpus", launched) != launched:
            raise ConfigError(
                "run.num_gpus", values["run.num_gpus"], f"torchrun started {launched} processes; leave it out"
            )
        values["run.num_gpus"] = launched
    base = override(PRESETS[context.params["cfg"]], TRANSFER_LEARNING if transfer else {})
    return override(base, values)


def _num_nodes() -> int:
    launched = distributed.launched_world_size()
    return 1 if launched is None else launched // int(os.environ["LOCAL_WORLD_SIZE"])


def _metrics(config: TrainConfig) -> tuple[tuple[str, ...], str | None]:
    """The metrics to compute and, where they were not named, why these. Refuses one that cannot be computed."""
    if config.run.metrics is None:
        return metrics.registry.default_metrics()
    names = metrics.registry.resolve(config.run.metrics)
    for name in names:
        metrics.registry.check_available(name)
    return tuple(names), None


def _print_plan(config: TrainConfig, dataset: ImageDataset) -> None:
    with torch.device("meta"):
        counts = {"G": config.generator.build(), "D": config.discriminator.build()}
    parameters = {name: count_parameters(network) for name, network in counts.items()}
    plan = {"options": to_json(config), "parameters": parameters, "images": len(dataset)}
    click.echo(json.dumps(plan, indent=2))


def _choose_start(outdir: Path, config: TrainConfig, dataset: ImageDataset, resume: str | None) -> Start:
    """Decide between going on, transferring and starting afresh. Raises UserError for a --resume that is nothing."""
    if resume == "latest":
        for run_dir in reversed(_runs(outdir)):
            if _same_run(run_dir, config) and hooks.list_states(run_dir):
                return Start(run_dir, resumes=True, snapshot=None)
    elif resume is not None and Path(resume).is_dir():
        run_dir = Path(resume)
        if not hooks.list_states(run_dir):
            raise UserError(f"--resume={resume}: this folder holds no training state (training-state-*.pt)")
        _check_same(run_dir, config)
        return Start(run_dir, resumes=True, snapshot=None)
    elif resume is not None and not Path(resume).is_file():
        raise UserError(f"--resume={resume}: neither `latest` nor a run's folder nor a snapshot file")
    snapshot = Path(resume) if resume not in (None, "latest") else None
    return Start(_new_run_dir(outdir, config, dataset), resumes=False, snapshot=snapshot)


def _runs(outdir: Path) -> list[Path]:
    """The numbered run folders in `outdir`, oldest first."""
    return sorted(path for path in outdir.glob("[0-9]*-*") if re.match(r"\d{5,}-", path.name) and path.is_dir())


def _saved_options(run_dir: Path) -> Mapping[str, Any]:
    path = run_dir / "training_options.json"
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _same_run(run_dir: Path, config: TrainConfig) -> bool:
    return (run_dir / "training_options.json").is_file() and same_training(_saved_options(run_dir), config)


def _check_same(run_dir: Path, config: TrainConfig) -> None:
    saved = _saved_options(run_dir)
    if not same_training(saved, config):
        changed = [line for line in differences(saved, to_json(config)) if not line.startswith("run.")]
        raise UserError(
            f"--resume={run_dir}: that run was started with other options; give the same ones:\n  "
            + "\n  ".join(changed)
        )


def _new_run_dir(outdir: Path, config: TrainConfig, dataset: ImageDataset) -> Path:
    """outdir/00003-<data>-<what>: the next free number, and what the run is in short."""
    number = max((int(path.name.split("-")[0]) for path in _runs(outdir)), default=-1) + 1
    words = [re.sub(r"[^\w.]+", "_", dataset.name), config.preset]
    words += ["cond"] if config.data.use_labels else []
    words += ["mirror"] if config.data.mirror else []
    words += ["linformer"] if config.generator.linformer else []
    words += [f"gpus{config.run.num_gpus}", f"batch{config.batch_size}"]
    return outdir / f"{number:05d}-{'-'.join(words)}"


def _prepare_run(outdir: Path, config: TrainConfig, dataset: ImageDataset, resume: str | None) -> Start:
    """Choose the run's folder and write the resolved options into it."""
    start = _choose_start(outdir, config, dataset, resume)
    if start.snapshot:
        load_network(start.snapshot)  # one that cannot be read is refused before anything is written
    try:
        start.run_dir.mkdir(parents=True, exist_ok=start.resumes)
        write_atomically(start.run_dir / "training_options.json", json.dumps(to_json(config), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--outdir={outdir}: cannot be written ({error.strerror})") from None
    return start


def _describe_data(dataset: ImageDataset, config: TrainConfig) -> None:
    C, H, W = dataset.img_shape
    _say(f"Data: {len(dataset)} images of {W}x{H}, {C} channels, from {config.data.path}")
    if dataset.has_labels and not config.data.use_labels:
        _say("NOTE: THE DATA SET HAS LABELS, AND THEY ARE NOT USED. For a conditional model give --cond.")


def _transfer(trainer: Trainer, path: Path) -> None:
    """Start from the weights of a snapshot, and say what was taken."""
    snapshot = load_network(path)
    lines = []
    pairs = (("G", snapshot.G, trainer.G), ("D", snapshot.D, trainer.D), ("G_ema", snapshot.G_ema, trainer.ema.module))
    for name, source, target in pairs:
        if source is None:
            raise UserError(f"--resume={path}: holds no {name}, as it was written for generation only")
        lines += copy_weights(source, target, name)
    _say(f"Starting from {path} (kimg {snapshot.kimg:g}):\n  " + "\n  ".join(lines))


def _summaries(trainer: Trainer) -> str:
    z = torch.zeros([1, trainer.G.z_dim], device=trainer.device)
    c = torch.zeros([1, trainer.G.c_dim], device=trainer.device)
    img = torch.zeros([1, *trainer.G.img_shape], device=trainer.device)
    return f"{module_summary(trainer.G, [z, c])}\n\n{module_summary(trainer.D, [img, c])}\n"


def _say(text: str) -> None:
    if distributed.is_main():
        print(text, flush=True)


if __name__ == "__main__":
    main()
