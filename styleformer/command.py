"""The `styleformer` command, with the scripts as subcommands. A script is imported only when its subcommand runs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

import click
from click.shell_completion import CompletionItem

import dnnlib
from dnnlib.cli import ProgramGroup
from dnnlib.config import did_you_mean

NAME = "styleformer"
COMMANDS = {  # name -> (module with `main`, help line)
    "train": ("train", "Train a GAN."),
    "generate": ("generate", "Generate images from a snapshot, and explore the model."),
    "metrics": ("calc_metrics", "Compute metrics of snapshots or images."),
    "dataset": ("dataset_tool", "Build or check a dataset."),
    "snapshot": ("legacy", "Inspect and convert snapshots."),
    "report": ("report", "Report on runs: an HTML page with curves and images."),
}


class LazyGroup(ProgramGroup):
    """Group of the commands in COMMANDS. Help and completion of command names do not import the scripts."""

    # Used by dnnlib.cli.with_run_name.
    scripts: Mapping[str, str] = {script: name for name, (script, _) in COMMANDS.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[name][0]).main
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve a command name. Raises UsageError, which suggests the closest command or the command of a script."""
        name = args[0]
        if name in COMMANDS or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        meant = self.scripts.get(name.removesuffix(".py"))
        hint = f"; did you mean {meant}?" if meant else did_you_mean(name, COMMANDS)
        raise click.UsageError(f"no command {name!r}{hint}", ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands (COMMAND --help)"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        names = [CompletionItem(name, help=text) for name, (_, text) in COMMANDS.items() if name.startswith(incomplete)]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run as `styleformer`, also under `python -m styleformer`; in shell completion, print the completions."""
        kwargs = {"prog_name": NAME, **kwargs}
        if f"_{NAME.upper()}_COMPLETE" not in os.environ:
            return super().main(*args, **kwargs)
        from styleformer import completion

        completion.register()
        return click.Group.main(self, *args, **kwargs)  # not super(): Screen rejects the bytes of completions


@click.command(NAME, cls=LazyGroup)
@click.version_option(dnnlib.__version__, prog_name="Styleformer", help="Show the version and exit.")
def main() -> None:
    """Train, sample and evaluate style-based transformer GANs."""
