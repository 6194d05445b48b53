"""Base of the command-line scripts: options with a config path, two spellings per flag, error handling."""

from __future__ import annotations

import importlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

import dnnlib
from dnnlib import streams
from dnnlib.config import FLOAT32_MAX, ConfigError, UserError
from dnnlib.config_text import MAX_DIGITS
from dnnlib.download import is_url
from dnnlib.screen import guarded
from dnnlib.streams import OutputError
from dnnlib.util import explain

# click's decorators are untyped.
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


MAX_NUMBERS = 10_000_000  # maximum size of a list of ranges, e.g. of seeds (one image each)
HEAD_START = 5.0  # seconds that other ranks wait under torchrun, so that local rank 0 reports an error first
_BARE_GROUP = "dnnlib.cli.bare_group"  # key of the DefaultGroup in a context's meta if no argument follows the group


class ConfigOption(click.Option):
    """Click option that may set a configuration field; config_text.py parses its text.

    `section` is the heading of the option in the help.
    """

    section: str | None = None

    def __init__(self, *args: Any, field: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.field = field

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the help entry with one spelling per flag."""
        every = self.opts
        self.opts = [flag for i, flag in enumerate(every) if flag not in map(_other_spelling, every[:i])]
        record = super().get_help_record(ctx)
        self.opts = every
        return record

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        """Complete paths if the metavar denotes a path, because options of config fields have no click path type."""
        items = super().shell_complete(ctx, incomplete)
        if items or not {"PATH", "DIR", "FILE", "PKL"} & {*re.findall(r"[A-Z]+", self.metavar or "")}:
            return items
        return [CompletionItem(incomplete, type="dir" if self.metavar == "DIR" else "file")]


def option(*flags: str, field: str | None = None, **kwargs: Any) -> Decorator:
    """`click.option` that accepts both `--g_dict` and `--g-dict`; `field` is the config path that the flag sets.

    A repeated list of names is concatenated; any other repeated option takes its last value, as usual.
    """
    if kwargs.get("type") is float:
        kwargs["type"] = FiniteFloat()
    if isinstance(kwargs.get("type"), NameList):
        default = kwargs.get("default")
        kwargs |= {"multiple": True, "callback": _join_lists, "default": None if default is None else (default,)}
    return click.option(*with_both_spellings(flags), cls=ConfigOption, field=field, **kwargs)


def _join_lists(context: click.Context, parameter: click.Parameter, given: Sequence[Sequence[str]]) -> Any:
    """Concatenate the values of a repeated option; return None if the option is not given."""
    return tuple(name for names in given for name in names) if given else None


def switch(*flags: str, field: str | None = None, **kwargs: Any) -> Decorator:
    """Return a boolean option: `--mirror` or `--mirror=1` is on, `--mirror=0` off; None if it is not given."""
    kwargs |= {"is_flag": False, "metavar": "[BOOL]"}
    if field:
        return option(*flags, field=field, flag_value="true", **kwargs)
    return option(*flags, type=bool, flag_value=True, **kwargs)


def list_option(*flags: str, field: str, **kwargs: Any) -> Decorator:
    """Return an option for a field with a list of names; repeated lists are concatenated, `none` is the empty list."""
    return option(*flags, field=field, multiple=True, callback=_join_texts, metavar="NAME,...", **kwargs)


def _join_texts(context: click.Context, parameter: click.Parameter, given: Sequence[str]) -> str | None:
    names = [text for text in given if text.lower() != "none"]
    return ",".join(names or given[:1]) if given else None


def with_options(options: Iterable[Decorator]) -> Decorator:
    """Return a decorator that attaches options to a command in the given order."""

    def attach(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorate in reversed(tuple(options)):
            function = decorate(function)
        return function

    return attach


def with_sections(sections: Mapping[str, Iterable[Decorator]]) -> Decorator:
    """Return a decorator that attaches options to a command; `sections` maps the headings of the help to options."""

    def attach(function: Any) -> Any:
        for heading, options in reversed([*sections.items()]):
            for decorate in reversed(tuple(options)):
                function = decorate(function)
                function.__click_params__[-1].section = heading
        return function

    return attach


def call(function: str, **options: Any) -> Any:
    """Import and call a function, e.g. `exploration.play:play`; deferring the import keeps torch out of --help."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(**options)


def settings_option() -> Decorator:
    """Return the option --set, which sets any field, in particular fields without a flag."""
    return option(
        "--set",
        "settings",
        multiple=True,
        metavar="FIELD=VALUE",
        help="Set any field, e.g. generator.window=8; repeatable. docs/configuration.md lists all fields.",
    )


def with_both_spellings(flags: Iterable[str]) -> list[str]:
    """Return the flags, with the other spelling (`-` for `_` or `_` for `-`) after each long flag."""
    both = []
    for flag in flags:
        both.append(flag)
        if flag.startswith("--") and _other_spelling(flag) != flag:
            both.append(_other_spelling(flag))
    return both


def _other_spelling(flag: str) -> str:
    name = flag[2:]
    return "--" + (name.replace("_", "-") if "_" in name else name.replace("-", "_"))


def config_texts(context: click.Context) -> dict[str, str]:
    """Return {config path: text} of the options given on the command line, including --set. Raises UserError."""
    texts = {}
    for parameter in context.command.params:
        text = context.params.get(parameter.name or "")
        if isinstance(parameter, ConfigOption) and parameter.field and text is not None:
            texts[parameter.field] = text
    settings = {}
    for setting in context.params.get("settings", ()):
        path, equals, text = (part.strip() for part in setting.partition("="))
        if not equals:
            raise UserError(f"--set {setting}: give a value: --set {path or 'FIELD'}=VALUE")
        if path in texts:
            raise UserError(f"--set {setting}: {_flag_of(context.command, path)} sets it too: give one of the two")
        settings[path] = text
    return texts | settings


def _flag_of(command: click.Command, path: str) -> str | None:
    """Return the flag that sets a config field, or None. `path` may lack leading parts (see ConfigError)."""
    options = [parameter for parameter in command.params if isinstance(parameter, ConfigOption) and parameter.field]
    return next((option.opts[0] for option in options if f".{option.field}".endswith(f".{path}")), None)


class Program(click.Command):
    """Command or group of commands that can be run as a script.

    Output is sanitized (dnnlib/screen.py); if stdout fails, the program exits with one line on stderr.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        streams.protect(needs_stdout=True)
        with guarded():
            try:
                try:
                    return super().main(*args, **kwargs)
                finally:
                    sys.stdout.flush()
            except OutputError as error:  # raised outside a command: by --help or by the final flush
                click.echo(f"Error: {error}", err=True)
                sys.exit(Failure.exit_code)


class Script(Program):
    """Command that reports a user error as one line on stderr with exit code 2.

    User errors are UserError, ConfigError, unusable files and folders, and out of memory. A leading ~ is expanded in
    `--data=~/x`, as the shell does in `--data ~/x`. `removed` maps flags of earlier versions to their fields.
    """

    def __init__(self, *args: Any, removed: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.removed = removed or {}
        click.version_option(dnnlib.__version__, prog_name="Styleformer", help="Show the version and exit.")(self)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        home = re.compile(r"(--[\w-]+=)(~[\w.-]*(?:/.*)?)", re.ASCII | re.DOTALL)
        matches = [(word, home.fullmatch(word)) for word in args]
        args = [m[1] + os.path.expanduser(m[2]) if m else word for word, m in matches]
        for word in args:
            self._check_optional_value(ctx, *word.partition("=")[::2])
        try:
            return super().parse_args(ctx, [*args])  # a copy, because click consumes the list
        except click.NoSuchOption as error:
            if fields := self.removed.get(error.option_name.replace("_", "-")):
                raise click.UsageError(_explain_removed(error.option_name, fields.split(), args), ctx) from None
            raise

    def _check_optional_value(self, ctx: click.Context, flag: str, value: str) -> None:
        """Reject e.g. `--mirror=-1` with a clear message; click would parse an optional value `-1` as a flag."""
        for parameter in self.params if value.startswith("-") else ():
            if flag in parameter.opts and isinstance(parameter, ConfigOption) and parameter.flag_value is not None:
                kind = click.BOOL if parameter.flag_value == "true" else parameter.type
                kind.convert(value, parameter, ctx)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        """Complete options in one spelling, and the commands of a DefaultGroup directly after its name."""
        items = {item.value: item for item in super().shell_complete(ctx, incomplete)}
        every = [*items]
        items = {flag: items[flag] for i, flag in enumerate(every) if _other_spelling(flag) not in every[:i]}
        group = ctx.meta.get(_BARE_GROUP)
        commands = group.commands.items() if group and not incomplete.startswith("-") else ()
        names = [(name, one.get_short_help_str()) for name, one in commands if name.startswith(incomplete)]
        return [*items.values(), *(CompletionItem(name, help=text) for name, text in names)]

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help text, with examples that use the name by which the command was run."""
        text = self.help
        self.help = text and with_run_name(text, ctx)
        super().format_help_text(ctx, formatter)
        self.help = text

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                heading = getattr(parameter, "section", None) or next(iter(sections), "Options")
                sections.setdefault(heading, []).append((record[0], with_run_name(record[1], ctx)))
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            fail(self, error)
        except (MemoryError, RuntimeError, OSError) as error:
            if message := explain(error):
                fail(self, UserError(message))
            raise

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the group's other commands in the help of its default command, which also serves as the group's help."""
        group = ctx.parent.command if ctx.parent else None
        if isinstance(group, DefaultGroup) and group.default == ctx.info_name:
            others = [(name, cmd.get_short_help_str(90)) for name, cmd in group.commands.items() if cmd is not self]
            with formatter.section("Other commands (COMMAND --help)"):
                formatter.write_dl(others)


def _explain_removed(flag: str, fields: Sequence[str], args: Sequence[str]) -> str:
    """Return the message for a removed flag: the --set options that replace it, with the value from `args`."""
    position, word = next((i, word) for i, word in enumerate(args) if word.partition("=")[0] == flag)
    value = word.partition("=")[2]
    if not value and position + 1 < len(args) and not args[position + 1].startswith("-"):
        value = args[position + 1]
    settings = " ".join(f"--set {field}={value or 'true'}" for field in fields)
    return f"{flag} was removed: use {settings}"


class ProgramGroup(Program, click.Group):
    """Group of commands that can be run as a script."""


class DefaultGroup(ProgramGroup):
    """Group with a default command: `generate.py --seeds=0` means `generate.py images --seeds=0`.

    The default command must not take positional arguments.
    """

    def __init__(self, *args: Any, default: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:
            ctx.meta[_BARE_GROUP] = self
        return super().parse_args(ctx, args if args and not args[0].startswith("-") else [self.default, *args])


def with_run_name(text: str, context: click.Context | None = None) -> str:
    """Replace script names in text with the command the user ran, e.g. `python train.py` with `styleformer train`.

    Text is unchanged if a script was run directly. A command that runs scripts as subcommands lists them in its
    attribute `scripts`, {script: subcommand}. A match after a quote, `-`, `=`, `.` or a slash, or at the start of the
    text, may be part of a user's path and is not replaced.
    """
    context = context or click.get_current_context(silent=True)
    root = context.find_root() if context else None
    names: Mapping[str, str] = getattr(root.command, "scripts", {}) if root else {}
    if not root or not names:
        return text
    script = rf"(?<!^)(?<![\w./\\='\"-])(?:python )?\b({'|'.join(names)})\.py\b"
    text = re.sub(script, lambda match: f"{root.info_name} {names[match[1]]}", text)
    return re.sub(r"pip install '\.\[\w+\]'", r"\g<0> in the checkout", text)


class Failure(click.ClickException):
    """Error that click reports as one line on stderr with exit code 2."""

    exit_code = 2


def fail(command: click.Command, error: UserError) -> NoReturn:
    """Raise the click error for a UserError.

    Under torchrun, local rank 0 reports an error that all ranks raise; torchrun then kills the others. Other ranks wait
    for HEAD_START seconds and report only if they are still alive, i.e. if rank 0 did not fail.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(HEAD_START)
    raise Failure(explain_error(command, error)) from None


def explain_error(command: click.Command, error: UserError) -> str:
    """Return the message of a UserError; a ConfigError names the flag of its field, or --set."""
    if not isinstance(error, ConfigError):
        return with_run_name(str(error))
    flag = _flag_of(command, error.field)
    if flag is None and "settings" in (parameter.name for parameter in command.params):
        flag = f"--set {error.field}"
    shown = ",".join(map(str, error.value)) if isinstance(error.value, tuple) else error.value
    return with_run_name(f"{flag}={shown}: {error.problem}" if flag else str(error))


class FiniteFloat(click.types.FloatParamType):
    """Float that is finite in single precision."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not abs(number) <= FLOAT32_MAX:
            self.fail(f"{value!r} is not a finite number in single precision", param, ctx)
        return number


class FloatList(click.ParamType):
    """Comma-separated finite numbers, e.g. 3.0,20.0."""

    name = "X,X,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(FiniteFloat().convert(item.strip(), param, ctx) for item in str(value).split(","))


class FileOrURL(click.ParamType):
    """Path of a file or folder, or an http(s) URL, which stays a string."""

    name = "PATH|URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        if isinstance(value, Path) or is_url(value):
            return value
        if re.match(r"[a-zA-Z][\w+.-]+://", value):
            self.fail(f"{value}: only http:// and https:// URLs are supported; download the file manually", param, ctx)
        return Path(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        return [CompletionItem(incomplete, type="file")]


class IntList(click.ParamType):
    """Comma-separated positive integers, e.g. 256,64,16."""

    name = "INT,INT,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if not re.fullmatch(rf"\d{{1,{MAX_DIGITS}}}(,\d{{1,{MAX_DIGITS}}})*", str(value), re.ASCII):
            self.fail(f"{value!r} is not a comma-separated list of integers such as 256,64,16", param, ctx)
        return tuple(int(item) for item in str(value).split(","))


class IntOrAuto(click.ParamType):
    """Integer of at least `minimum`, or the word auto."""

    name = "INT|auto"

    def __init__(self, minimum: int | None = None) -> None:
        self.minimum = minimum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        return "auto" if value == "auto" else int(click.IntRange(min=self.minimum).convert(value, param, ctx))


class NameList(click.ParamType):
    """Comma-separated names; `none` (case-insensitive) is the empty list."""

    name = "NAME,NAME,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return () if value.lower() == "none" else tuple(name.strip() for name in value.split(",") if name.strip())


class IntRanges(click.ParamType):
    """Integers and ranges, e.g. 0-35,40."""

    name = "A-B,C,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        numbers: list[int] = []
        for part in str(value).split(","):
            match = re.fullmatch(rf"(\d{{1,{MAX_DIGITS}}})(?:-(\d{{1,{MAX_DIGITS}}}))?", part.strip(), re.ASCII)
            if not match:
                self.fail(f"{part!r} in {value!r} is neither a number nor a range such as 0-35", param, ctx)
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                self.fail(f"the range {part!r} runs backwards: write {last}-{first}", param, ctx)
            if len(numbers) + last - first >= MAX_NUMBERS:
                self.fail(f"{value!r} has more than {MAX_NUMBERS} numbers", param, ctx)
            numbers += range(first, last + 1)
        return tuple(numbers)
