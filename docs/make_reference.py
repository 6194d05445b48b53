"""Write the parts of the documentation that come from the code: docs/train-help.txt and docs/configuration.md.

`make docs` runs it; a test fails when the files are not what it would write.
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
from dnnlib.config import bounds_of, override, to_json  # noqa: E402
from training.config import PRESETS, TrainConfig  # noqa: E402

HEADER = """# Configuration

*Written by `make docs` from the code.*

A training run is determined by a `TrainConfig` (training/config.py), composed of the configurations of its parts, each
a frozen dataclass beside the class that it configures. `train.py` starts from a preset (`--cfg`), replaces what the
options say, fills in what depends on the data (`auto` below), and writes the result to `training_options.json`, into
every snapshot and every training state. `python train.py ... -n` prints it without training.

**Every field can be set**, by its flag where it has one and by `--set` in any case:

    python train.py --outdir=runs --data=data/mine.zip --gen=transgan --set generator.window=8

Lists are typed with commas, sizes as `8x12` (height x width), switches as `true` or `false`; `none` stands for nothing
and `auto` for a choice by data and machine, where a field has that. A mistyped name is answered with the nearest ones.

Generator and discriminator can be of several families (`--gen`, `--disc`): the other families' fields take the place of
the preset's, open where they can be; of a generator only latents, mapping network and clamp stay, of a discriminator
nothing. TransGAN has no mapping network either, unless `--map-depth` asks for one. A setting that the family has no
field for is refused.

A run that is resumed has its saved configuration plus the options that are typed. Those may change the part `run`
(duration, machine, logging), and anything else only with `--override` ([running.md](running.md#stopping-and-resuming)).
Of `run`, `batch_gpu` and `num_gpus` decide what is drawn and seen together
([running.md](running.md#several-processes)), `compile` and `graphs` change rounding, and `nan=skip` leaves updates out.

## What `auto` chooses

From the larger side R of the images, the number of GPUs and what they can do:

| | |
|---|---|
| batch | as many images as fit 4096 / R per GPU, at most 32 per GPU and 64 in all |
| learning rates | 0.0025; 0.002 from 1024 pixels on |
| gamma | 0.0002 R^2 / batch |
| EMA | a half-life of 10 batch / 32 kimg |
| widths and blocks | of up to three resolutions those of `cifar`; of more, this project's choice: 512,256,128,64,... |
| Linformer | with more than three resolutions |
| channels of StyleGAN2's D | base 16384 below 512 pixels, 32768 from there on |
| precision | bfloat16 on GPUs that have units for it (from Ampere on), float32 on others and on a CPU |
| CUDA graphs | on GPUs for images of up to 64 pixels, unless `--grad-checkpoint` is given |

GPUs before Ampere (V100, T4, RTX 20) have units for float16 instead: `--precision=fp16 --set reduced_from=R/8`, for
example 32 for images of 256 pixels, is the arithmetic of StyleGAN2-ADA.
"""

FIELDS_HEADER = """## Fields

A default `auto` or `none` is None in Python, or for a field that says so () or 0. Of lists, the values are those of
each item.
"""

PRESETS_HEADER = """The last column has what else differs from `auto` with networks of the same families.

That Styleformer's released models were trained on the schedule of `cifar` is inferred from the sizes of their files;
the widths and the schedule of `styleformer-c256` are this project's choice; [transgan.md](transgan.md) says what is
inferred of TransGAN's.
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
    """Return a table of all fields with their flags, and one of the presets."""
    options = [option for option in train.main.params if isinstance(option, ConfigOption)]
    flags = {option.field: option.opts[0] for option in options if option.field}
    tables = [_fields_table(*part, flags) for part in _parts()]
    return "\n".join([HEADER, FIELDS_HEADER, *tables, "## Presets\n", PRESETS_HEADER, _presets_table(flags)])


def _parts() -> list[tuple[str, str, Any]]:
    """(title, path, configuration) of the parts of TrainConfig, its own fields first, and of each family of a part."""
    config = PRESETS["auto"]
    parts: list[tuple[str, str, Any]] = [("TrainConfig", "", config)]
    for field in dataclasses.fields(TrainConfig):
        value = getattr(config, field.name)
        families = field.metadata.get("families", {})
        for family in families if len(families) > 1 else ():
            chosen = getattr(override(config, {f"{field.name}.family": family}), field.name)
            parts.append((f"{field.name}: {family}", field.name, chosen))
        if dataclasses.is_dataclass(value) and len(families) < 2:
            parts.append((field.name, field.name, value))
    return parts


def _fields_table(title: str, path: str, config: Any, flags: dict[str, str]) -> str:
    bounds = bounds_of(type(config))
    heading = f"### {title}\n\n`{type(config).__name__}` in {_source(type(config))}. {_summary(config)}\n"
    rows = ["| field | flag | default | values | description |", "|---|---|---|---|---|"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not dataclasses.is_dataclass(value) and field.name != "preset":
            full = f"{path}.{field.name}" if path else field.name
            flag = f"`{flags[full]}`" if full in flags else ""
            values, text = bounds[field.name], field.metadata["help"]
            rows.append(f"| {field.name} | {flag} | {_show(full, value)} | {values} | {text} |")
    return "\n".join([heading, *rows, ""])


@cache
def _open_values() -> dict[str, Any]:
    """Return {path: value} of the values that stand for a choice by data and machine."""
    values: dict[str, Any] = {}
    for _, path, config in _parts():
        prefix = f"{path}." if path else ""
        values |= {f"{prefix}{field.name}": None for field in dataclasses.fields(config) if field.metadata["auto"]}
        values |= {f"{prefix}{name}": value for name, value in getattr(config, "AUTO", {}).items()}
    return values


def _source(config_class: type) -> str:
    return config_class.__module__.replace(".", "/") + ".py"


def _summary(config: Any) -> str:
    """The first paragraph of the docstring on one line."""
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
            data["loss.r1_gamma"] = ""  # it has no R1
        shown = [_show(path, data.get(path, "")) for path in columns.values()]
        further = [
            f"`{flags.get(path, path)}={_show(path, value)}`"
            for path, value in _differences(config).items()
            if path not in columns.values()
        ]
        rows.append(f"| {name} | {' | '.join(shown)} | {' '.join(dict.fromkeys(further))} |")
    return "\n".join(rows) + "\n"


def _differences(config: TrainConfig) -> dict[str, Any]:
    """The fields in which a preset differs from `auto` with networks of the same families."""
    values = _flatten(to_json(dataclasses.replace(config, preset="auto")))
    families = {path: values[path] for path in ("generator.family", "discriminator.family")}
    plain = _flatten(to_json(override(PRESETS["auto"], families)))
    return {path: value for path, value in values.items() if value != plain[path]}


def _flatten(data: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by their paths."""
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
    open_values = _open_values()
    if path in open_values and value == open_values[path]:
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
