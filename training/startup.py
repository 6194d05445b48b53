"""Checks before training, dry run, and launch of the processes of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import click
import torch

import metrics.registry
from dnnlib.config import ConfigError, UserError, override, to_json
from dnnlib.config_text import parse_texts
from dnnlib.download import is_url
from metrics.detectors import read_detectors
from torch_utils import distributed
from torch_utils.misc import count_parameters
from training import worker
from training.config import PRESETS, RunConfig, TrainConfig
from training.dataset import allow_open_files
from training.evaluation import metric_names
from training.forecast import describe
from training.loggers import choose_loggers
from training.restore import notes_on, transfer
from training.resume import RunRequest, Start, choose_start, open_dataset
from training.snapshots.reading import load_network, transfer_options

Explain = Callable[[UserError], str]


def train(request: RunRequest, *, dry_run: bool, forecast: bool = False, explain: Explain = str) -> None:
    """Train, or print the resolved configuration of a dry run, optionally with a forecast from a few steps.

    The start is chosen once: in this process or, under torchrun, on rank 0, which broadcasts it. Under torchrun,
    `explain` returns the message of a UserError on rank 0; otherwise the error is raised unchanged.
    """
    if forecast and (not dry_run or distributed.launched_world_size() is not None):
        raise UserError("--forecast: only with --dry-run, and with --gpus in place of torchrun")
    open_dataset.cache_clear()  # the files may have changed since another run in this process
    if distributed.launched_world_size() is None:
        start = prepare(request, dry_run=dry_run)
        if not dry_run:
            launch(partial(worker.train, start, open_dataset(start.config.data)), start.config)
        elif forecast:
            report = partial(_print_plan, start)
            launch(partial(worker.forecast, start, open_dataset(start.config.data), report), start.config)
        else:
            _print_plan(start)
    elif not dry_run:
        request = _as_launched(request)
        run = {path: text for path, text in request.texts.items() if path.startswith("run.")}
        config = override(PRESETS["auto"], parse_texts(PRESETS["auto"], run))
        launch(partial(_train_under_torchrun, request, explain), config)
    elif distributed.launched_rank() == 0:
        _print_plan(prepare(_as_launched(request), dry_run=True))


def launch(function: Callable[[], None], config: TrainConfig) -> None:
    """Call a function in every process of a run with this configuration."""
    device = distributed.choose_device(config.run.device)
    distributed.check_processes(config.run.num_gpus, config.run.device, device)
    distributed.launch(function, config.run.num_gpus, device_type=device.type, timeout=config.run.timeout)


def _train_under_torchrun(request: RunRequest, explain: Explain) -> None:
    """Train in a process of torchrun, with the start chosen on rank 0."""

    def choose() -> Start:
        try:
            return prepare(request, dry_run=False)
        except UserError as error:
            raise UserError(explain(error)) from None

    worker.train(distributed.from_main(choose))


def _as_launched(request: RunRequest) -> RunRequest:
    """Use the number of processes and the device given by torchrun, even for a resumed run. Raises ConfigError."""
    launched = str(distributed.launched_world_size())
    texts = {"run.device": "auto", "run.timeout": str(RunConfig.timeout), "run.num_gpus": launched, **request.texts}
    if texts["run.num_gpus"] != launched:
        raise ConfigError("run.num_gpus", texts["run.num_gpus"], f"torchrun started {launched} processes; omit it")
    return replace(request, texts=texts)


def prepare(request: RunRequest, *, dry_run: bool) -> Start:
    """Choose and check the start of a run; a dry run downloads nothing. Raises UserError."""
    start = choose_start(replace(request, transfer_options=partial(_transfer_options, dry_run=dry_run)))
    config = start.config
    setup = read_detectors(config.run.detectors)
    names = {name: getattr(config.run, name) for name in ("metrics", "tick_metrics")}
    names = {name: tuple(metrics.registry.resolve(given, setup)) for name, given in names.items() if given is not None}
    config = override(config, {f"run.{name}": value for name, value in names.items()})
    choose_loggers(config.run.log)
    if config.run.workers or config.run.num_gpus > 1:
        allow_open_files(config.run.workers or 0)
    start = replace(start, config=config)
    for name in () if dry_run else (*metric_names(config.run, setup), *config.run.tick_metrics):
        metrics.registry.check_available(name, setup)
    return start


def _transfer_options(path: str, *, dry_run: bool) -> Mapping[str, Any]:
    """Return the options that a snapshot implies for training from it; a dry run does not download it."""
    return {} if dry_run and is_url(path) else transfer_options(path)


def _print_plan(start: Start, forecast: Mapping[str, float] | None = None) -> None:
    """Print configuration, parameter counts, initial weights and a forecast; a snapshot at a URL is not downloaded."""
    config, dataset = start.config, open_dataset(start.config.data)
    for note in dataset.notes:
        click.echo(f"Note: {note}", err=True)
    with torch.device("meta"):
        networks = {"G": config.generator.build(), "D": config.discriminator.build()}
    parameters = {name: count_parameters(network) for name, network in networks.items()}
    if start.snapshot and not is_url(start.snapshot):
        networks["G_ema"] = networks["G"]
        snapshot = load_network(start.snapshot)
        for note in notes_on(start.snapshot, snapshot):
            click.echo(note, err=True)
        config, _ = transfer(config, networks, start.snapshot, snapshot)
    plan: dict[str, Any] = {"options": to_json(config), "parameters": parameters, "images": len(dataset)}
    if forecast:
        plan["forecast"] = {name: float(f"{value:.4g}") for name, value in forecast.items()}
    click.echo(json.dumps(plan, indent=2))
    if forecast:
        click.echo(describe(forecast), err=True)
