"""Browser page to explore a generator, served on this machine only."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click

from dnnlib.cli import with_run_name
from exploration.browser.networks import find_networks, load
from exploration.browser.player import Player
from exploration.browser.recipe import CommandLine
from exploration.browser.server import HOST, open_server


def play(*, network: Path | str, port: int, **options: Any) -> None:
    """Run `generate.py play`; `options` are those of `load`."""
    networks = find_networks(network, partial(load, **options))
    flags = [f"--{name}={options[name]}" for name in ("ema", "device") if options[name] is not None]
    flags += [f"--precision={options['precision']}"] if options["precision"] != "fp32" else []
    program = with_run_name(" python generate.py").strip()
    command = CommandLine(program=program, options=tuple(flags), projected_w=options["projected_w"])
    with open_server(Player(networks, command), port) as server, suppress(KeyboardInterrupt):
        click.echo(f"Serving http://{HOST}:{server.server_port}/, Ctrl-C to stop")
        server.serve_forever()
