"""Generate docs/train-help.txt and docs/configuration.md from the code.

`make docs` runs this script; a test fails if the files are out of date.
"""

from __future__ import annotations

import dataclasses
import sys
from functools import cache
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from dnnlib.cli import ConfigOption  # noqa: E402
from dnnlib.config import accepts_text_value, bounds_of, is_config, override, to_json  # noqa: E402
from training.config import PRESETS, TrainConfig  # noqa: E402

HEADER = """# Configuration

*Generated from the code by `make docs`.*

A training run is determined by a `TrainConfig` (training/config.py), composed of the configurations of its parts, each
a frozen dataclass beside the class that it configures. `train.py` starts from a preset (`--cfg`), applies the options,
resolves the values that depend on the data (`auto` below), and writes the result to `training_options.json` and to
every snapshot and training state. `python train.py ... -n` prints the configuration without training.

**Every field can be set**, by its flag if it has one and always by `--set`:

    python train.py --outdir=runs --data=data/mine.zip --gen=transgan --set generator.window=8

Lists are separated by commas, sizes are written as `8x12` (height x width), switches as `true` or `false`; where a
field supports them, `none` unsets the field and `auto` selects a value for the data and the machine. For an unknown
name, the error suggests the nearest names.

There are several families of generators and discriminators (`--gen`, `--disc`), each with its own fields. If `--gen` or
`--disc` replaces the preset's family, fields return to their defaults, `auto` where possible; only the latents, the
mapping network and the clamp of a generator are taken from the preset. TransGAN has no mapping network unless
`--map-depth` adds one, R3GAN has none. Setting a field that the family does not have is an error.

A resumed run uses its saved configuration, updated by the given options. Options may change the group `run` (duration,
machine, logging); any other field only with `--override` ([running.md](running.md#stopping-and-resuming)). In `run`,
`batch_gpu` and `num_gpus` determine the micro-batches and hence the random numbers
([running.md](running.md#several-processes)), `compile` and `graphs` change rounding, and `nan=skip` skips updates.

## What `auto` chooses

The choices depend on the longer side R of the images, the number of GPUs and their capabilities:

| | |
|---|---|
| batch | 4096 / R images per GPU, at most 32 per GPU and 64 in total |
| learning rates | 0.0025; 0.002 at 1024 pixels and above |
| gamma | 0.0002 R^2 / batch |
| EMA | half-life of 10 batch / 32 kimg |
| widths and blocks | those of `cifar` up to three resolutions; for more, this project's choice: 512,256,128,64,... |
| Linformer | with more than three resolutions |
| channels of StyleGAN2's D | base 16384 below 512 pixels, 32768 at 512 and above |
| precision | bfloat16 on GPUs with hardware support (Ampere and later), float32 on other devices |
| CUDA graphs | on GPUs for images of up to 64 pixels, unless `--grad-checkpoint` is given |

GPUs before Ampere (V100, T4, RTX 20) support float16 instead: `--precision=fp16 --set reduced_from=R/8`, for
example 32 for images of 256 pixels, is the mixed precision of StyleGAN2-ADA.
"""

FIELDS_HEADER = """## Fields

In Python, `auto` and `none` are None, or () or 0 where the description of the field states this. For lists, the range
applies to each item.
"""

PRESETS_HEADER = """The last column lists all other differences from `auto` for networks of the same families.

The schedule of `cifar` for Styleformer's released models is inferred from the sizes of their files; the widths and the
schedule of `styleformer-c256` are this project's choice, and so is [Styleformer2](styleformer2.md);
[transgan.md](transgan.md) and [r3gan.md](r3gan.md) list the inferred values of the other papers' presets.
"""


def main() -> None:
    """Write both files."""
    for name, text in {"train-help.txt": train_help(), "configuration.md": configuration()}.items():
        (ROOT / "docs" / name).write_text(text)


def train_help() -> str:
    """Return what `python train.py --help` prints."""
    context = click.Context(train.main, info_name="train.py", max_content_width=110, terminal_width=110)
    return train.main.get_help(context) + "\n"


def configuration() -> str:
    """Return configuration.md: tables of all fields with their flags, and a table of the presets."""
    options = [option for option in train.main.params if isinstance(option, ConfigOption)]
    flags = {option.field: option.opts[0] for option in options if option.field}
    tables = [_fields_table(*part, flags) for part in _parts()]
    return "\n".join([HEADER, FIELDS_HEADER, *tables, "## Presets\n", PRESETS_HEADER, _presets_table(flags)])


def _parts() -> list[tuple[str, str, Any]]:
    """Return (title, path, configuration) of TrainConfig itself, of each of its parts, and of each family of a part."""
    config = PRESETS["auto"]
    parts: list[tuple[str, str, Any]] = [("TrainConfig", "", config)]
    for field in dataclasses.fields(TrainConfig):
        value = getattr(config, field.name)
        families = field.metadata.get("families", {})
        for family in families if len(families) > 1 else ():
            chosen = getattr(override(config, {f"{field.name}.family": family}), field.name)
            parts.append((f"{field.name}: {family}", field.name, chosen))
        if is_config(value) and len(families) < 2:
            parts.append((field.name, field.name, value))
    return parts


def _fields_table(title: str, path: str, config: Any, flags: dict[str, str]) -> str:
    bounds = bounds_of(type(config))
    heading = f"### {title}\n\n`{type(config).__name__}` in {_source(type(config))}. {_summary(config)}\n"
    rows = ["| field | flag | default | values | description |", "|---|---|---|---|---|"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not is_config(value) and field.name != "preset":
            full = f"{path}.{field.name}" if path else field.name
            flag = f"`{flags[full]}`" if full in flags else ""
            values, text = str(bounds[field.name]), field.metadata["help"]
            if accepts_text_value(type(config), field.name):
                values += "; [schedule](schedules.md)"
            rows.append(f"| {field.name} | {flag} | {_show(full, value)} | {values} | {text} |")
    return "\n".join([heading, *rows, ""])


@cache
def _auto_values() -> dict[str, Any]:
    """Return the placeholders that `resolve` replaces with values for the data and the machine, by path."""
    values: dict[str, Any] = {}
    for _, path, config in _parts():
        prefix = f"{path}." if path else ""
        values |= {f"{prefix}{field.name}": None for field in dataclasses.fields(config) if field.metadata["auto"]}
        values |= {f"{prefix}{name}": value for name, value in getattr(config, "AUTO", {}).items()}
    return values


def _source(config_class: type) -> str:
    return config_class.__module__.replace(".", "/") + ".py"


def _summary(config: Any) -> str:
    """Return the first paragraph of the docstring on one line."""
    return " ".join((type(config).__doc__ or "").split("\n\n")[0].split())


def _presets_table(flags: dict[str, str]) -> str:
    columns = {
        "batch": "batch_size",
        "G": "generator.family",
        "widths": "generator.widths",
        "layers": "generator.layers",
        "base": "generator.base",
        "D": "discriminator.family",
        "lr of G": "g_optimizer.lr",
        "lr of D": "d_optimizer.lr",
        "loss": "loss.objective",
        "gamma": "loss.r1_gamma",
        "EMA kimg": "ema.kimg",
        "kimg": "run.total_kimg",
    }
    rows = [f"| `--cfg` | {' | '.join(columns)} | further |", "|---" * (len(columns) + 2) + "|"]
    for name, config in PRESETS.items():
        data = _flatten(to_json(config))
        if config.loss.objective == "wgangp-eps":
            data["loss.r1_gamma"] = ""  # wgangp-eps has no R1
        shown = [_show(path, data.get(path, "")) for path in columns.values()]
        further = [
            f"`{flags.get(path, path)}={_show(path, value)}`"
            for path, value in _differences(config).items()
            if path not in columns.values()
        ]
        rows.append(f"| {name} | {' | '.join(shown)} | {' '.join(dict.fromkeys(further))} |")
    return "\n".join(rows) + "\n"


def _differences(config: TrainConfig) -> dict[str, Any]:
    """Return the fields in which a preset differs from `auto` with networks of the same families."""
    values = _flatten(to_json(dataclasses.replace(config, preset="auto")))
    families = {path: values[path] for path in ("generator.family", "discriminator.family")}
    plain = _flatten(to_json(override(PRESETS["auto"], families)))
    return {path: value for path, value in values.items() if value != plain[path]}


def _flatten(data: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by path."""
    if not isinstance(data, dict):
        return {path: tuple(data) if isinstance(data, list) else data}
    return {
        leaf: value
        for name, part in data.items()
        for leaf, value in _flatten(part, f"{path}.{name}" if path else name).items()
    }


def _show(path: str, value: Any) -> str:
    if value == "" and path.startswith(("generator.", "discriminator.")):
        return ""
    auto_values = _auto_values()
    if path in auto_values and value == auto_values[path]:
        return "auto"
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
