"""Browser page to explore a generator, served on this machine only."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path

import click

from dnnlib.cli import with_run_name
from exploration.browser.networks import find_networks, load
from exploration.browser.player import Player
from exploration.browser.recipe import CommandLine
from exploration.browser.server import HOST, open_server


def play(
    *,
    network: Path | str,
    label: tuple[float, ...] | None,
    batch: int,
    precision: str,
    device: str | None,
    ema: float | None,
    projected_w: Path | None,
    directions: tuple[Path, ...],
    port: int,
) -> None:
    """Run `generate.py play`."""
    start = partial(
        load,
        label=label,
        batch=batch,
        precision=precision,
        device=device,
        ema=ema,
        projected_w=projected_w,
        directions=directions,
    )
    networks = find_networks(network, start)
    options = [f"--ema={ema:g}"] if ema is not None else []
    options += [f"--precision={precision}"] if precision != "fp32" else []
    options += [f"--device={device}"] if device is not None else []
    program = with_run_name(" python generate.py").strip()
    command = CommandLine(program=program, options=tuple(options), projected_w=projected_w)
    with open_server(Player(networks, command), port) as server, suppress(KeyboardInterrupt):
        click.echo(f"Serving http://{HOST}:{server.server_port}/, Ctrl-C to stop")
        server.serve_forever()
