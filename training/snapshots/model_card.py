"""Text of a model card: samples, usage, metrics, the training settings that matter, and the licence.

Metrics come from metric-*.jsonl beside the snapshot. Floors, which compare reals with reals, are no results of the
network and are omitted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dnnlib.config import ConfigError, differences, family_of, override, to_json
from dnnlib.download import sha256_of_file
from dnnlib.util import counted, read_metric_records
from metrics.registry import HOLDOUT_VALUES, find_recorded
from training.config import PRESETS, Environment, TrainConfig, apply_options, resolve
from training.networks import DISCRIMINATORS, GENERATORS
from training.snapshots.snapshot import Snapshot

SAMPLES = "samples.png"
NOT_COMPARED = {"data", "run", "origin", "precision", "channels_last"}  # stated elsewhere or irrelevant


def num_samples(G: Any) -> int:
    """Return the number of images in the sample grid: 16, or 4 if the images are large."""
    return 16 if max(G.img_shape[1:]) <= 256 else 4


def write_card(snapshot: Snapshot, config: TrainConfig, license: str | None) -> str:
    """Return the text of the model card in Markdown; `config` is the published configuration, without paths."""
    G = snapshot.G_ema
    C, H, W = G.img_shape
    c = f"torch.eye({G.c_dim})[torch.arange(4) % {G.c_dim}]" if G.c_dim else "None"
    classes = f" of {G.c_dim} classes" if G.c_dim else ""
    if G.c_dim and snapshot.label_kind() == "vectors":
        c, classes = f"torch.zeros(4, {G.c_dim})", f", conditioned on {G.c_dim} numbers,"
    data = f"`{config.data.path}`" if config.data.path else "a dataset of unknown name"
    summary = f"A generator of {W}x{H} images{classes} with {counted(C, 'channel')}"
    return f"""# {Path(snapshot.path).stem}

![Samples]({SAMPLES})

{summary}, trained on {data}.
The image shows seeds 0 to {num_samples(G) - 1} without truncation.

## Use

In a checkout of Styleformer, with `pip install '.[hub]'`:

```python
import torch
from training.snapshots.hub import HubModel

G = HubModel.from_pretrained("NAME/MODEL").G_ema  # or a folder with these files
img = G(torch.randn(4, G.z_dim), {c}, truncation_psi=0.7)  # (4, {C}, {H}, {W}) in about [-1, 1]
```

`python legacy.py convert --source=FOLDER --dest=model.pkl` converts a folder with these
files to a snapshot for `generate.py`.

## Metrics

{_describe_metrics(snapshot.path)}

## Training

{_describe_training(snapshot, config)}

## Licence

{f"`{license}`, chosen by the author." if license else "The author has not chosen a licence yet."}
"""


def read_records(snapshot: Path) -> Iterator[dict[str, Any]]:
    """Yield the last complete record of this snapshot file from each metric-*.jsonl beside it, without floors."""
    if not snapshot.is_file():
        return
    sha256 = sha256_of_file(snapshot)
    for path in sorted(snapshot.parent.glob("metric-*.jsonl")):
        own = (record for record in read_metric_records(path) if record.get("snapshot_sha256") == sha256)
        yield from [record for record in own if _is_complete(record)][-1:]


def _is_complete(record: dict[str, Any]) -> bool:
    """Return whether a record contains all fields that the model card shows, and is no floor."""
    texts = [record.get(name) for name in ("metric", "data", "protocol")]
    numbers = [record.get("num_real"), record.get("num_fake"), record.get("num_holdout", 0)]
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(number, int) for number in numbers):
        return False
    found = find_recorded(record["metric"])
    return not found[0].is_floor if found else record["num_fake"] > 0


def is_split_value(name: str) -> bool:
    """Return whether a recorded value compares with equal numbers of training and held-out images."""
    found = find_recorded(name)
    return found is not None and found[1] in HOLDOUT_VALUES


def _describe_metrics(snapshot: Path) -> str:
    """Return a table of the values, and below it each metric's meaning and protocol once."""
    rows, notes = ["| metric | value | images |", "|---|---|---|"], []
    for record in read_records(snapshot):
        rows += [f"| {name} | {value:.5g} | {_images_of(record, name)} |" for name, value in record["results"].items()]
        notes.append(_describe_metric(record))
    return "\n".join([*rows, "", *notes]) if notes else "No metrics are recorded."


def _images_of(record: dict[str, Any], name: str) -> str:
    """Return the numbers of images that a value of a record depends on."""
    spec, value = find_recorded(name) or (None, "")
    num_real, num_holdout = record["num_real"], record.get("num_holdout", 0)
    source = f"({Path(record['data']).name}{', with flips' if record.get('mirror') else ''})"
    held_out = f"{num_holdout:,} held-out" if num_holdout else ""
    if value in HOLDOUT_VALUES:
        reals = [held_out if value == "_holdout" else f"{num_holdout:,} training {source}"]
    else:
        has_split = spec is not None and set(HOLDOUT_VALUES) <= set(spec.values)
        reals = [f"{num_real:,} real {source}" if num_real else "", "" if has_split else held_out]
    return ", ".join(filter(None, [f"{record['num_fake']:,} generated", *reals]))


def _describe_metric(record: dict[str, Any]) -> str:
    """Return a list item with the meaning of a record's metric, and all that its value depends on."""
    meaning = ""
    if found := find_recorded(record["metric"]):
        spec = found[0]
        direction = f"{'higher' if spec.higher_is_better else 'lower'} is better"
        meaning = f"{'; '.join(filter(None, [spec.help, spec.note, direction]))}. "
    settings = [record.get("detector"), record["protocol"]]
    settings += [f"truncation psi {record['truncation_psi']:g}"] if record.get("truncation_psi", 1) != 1 else []
    settings += [f"{record['noise_mode']} noise"] if record.get("noise_mode") else []
    return f"- **{record['metric']}**: {meaning}Protocol: {'; '.join(filter(None, settings))}.".replace("<", "&lt;")


def _describe_training(snapshot: Snapshot, config: TrainConfig) -> str:
    """Return a table of the main settings, and the fields that differ from the preset."""
    data = [config.data.path or "unknown"]
    data += ["with labels"] if config.data.use_labels else []
    data += ["with flips"] if config.data.mirror else []
    data += [f"a random subset of {config.data.max_images:,} images"] if config.data.max_images else []
    data += [f"{counted(config.data.holdout, 'image')} held out"] if config.data.holdout else []
    num_parameters = sum(parameter.numel() for parameter in snapshot.G_ema.parameters())
    choices = _choices(config)
    rows = {
        "dataset": ", ".join(data),
        "duration": f"{snapshot.kimg:g} kimg (thousands of real images shown)",
        "batch size": config.batch_size or "unknown",
        "generator": f"{choices['generator.family']}, {num_parameters:,} parameters",
        "discriminator": choices["discriminator.family"],
        "objective": choices["loss.objective"],
        "augmentation": choices["augment.mode"],
        "precision": config.precision or "unknown",
        "initial weights": config.origin.source or "random",
        "preset": config.preset,
    }
    table = "\n".join(["| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    lines = [table, ""]
    if changed := changes(config, snapshot.G_ema.img_shape):
        lines += ["Settings that differ from the preset (preset -> this network):", "", "```", *changed, "```", ""]
    return "\n".join([*lines, "`config.json` contains the complete configuration."])


def changes(config: TrainConfig, img_shape: tuple[int, int, int]) -> list[str]:
    """Return a line 'field: preset -> value' for each setting that differs from the preset for images of this shape.

    Data, initial weights and settings of the run are not compared. Returns no lines for an unknown preset.
    """
    if config.preset not in PRESETS:
        return []
    preset = PRESETS[config.preset]
    old, new = _choices(preset), _choices(config)
    chosen = {path: value for path, value in new.items() if value != old[path]}
    try:
        base = override(apply_options(preset, chosen), {"data": config.data, "run.num_gpus": config.run.num_gpus})
        base = resolve(base, Environment(img_shape=img_shape, c_dim=config.generator.c_dim))
    except ConfigError:  # the preset does not support these images
        base = preset
    before, after = (
        {name: part for name, part in to_json(each).items() if name not in NOT_COMPARED} for each in (base, config)
    )
    return [*(f"{path}: {old[path]!r} -> {value!r}" for path, value in chosen.items()), *differences(before, after)]


def _choices(config: TrainConfig) -> dict[str, str]:
    """Return the settings that determine which other fields exist or matter, by path."""
    return {
        "generator.family": family_of(config.generator, GENERATORS),
        "discriminator.family": family_of(config.discriminator, DISCRIMINATORS),
        "loss.objective": config.loss.objective,
        "augment.mode": config.augment.mode,
    }
