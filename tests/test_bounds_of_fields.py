"""Bounds, error messages and descriptions of all configuration fields."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

from dnnlib.config import Bounds, ConfigError, bounds_of, hints, parse_size
from training.augment.pipe import AugmentConfig
from training.config import RunConfig, TrainConfig
from training.dataset import DatasetConfig
from training.ema import EMAConfig
from training.loss import LossConfig
from training.networks import DISCRIMINATORS, GENERATORS
from training.phases import AdamConfig
from training.snapshots.transfer import Origin

PARTS = (RunConfig, DatasetConfig, AugmentConfig, LossConfig, AdamConfig, EMAConfig, Origin)
CONFIGS: tuple[Any, ...] = (TrainConfig, *PARTS, *GENERATORS.values(), *DISCRIMINATORS.values())
FIELDS = [(config, field) for config in CONFIGS for field in dataclasses.fields(config)]
BOUNDED = [(config, field) for config, field in FIELDS if str(bounds_of(config)[field.name])]
ENDS = ("at_least", "above", "at_most", "below")
# Other fields that must be set before a field can be at the edge of its bounds.
ALSO: dict[tuple[str, str], dict[str, Any]] = {
    ("AugmentConfig", "p"): {"mode": "fixed"},
    ("AugmentConfig", "policy"): {"mode": "diffaug"},
    ("LossConfig", "gp_weight"): {"objective": "wgangp-eps", "r1_interval": None},
    ("LossConfig", "drift_weight"): {"objective": "wgangp-eps", "r1_interval": None},
    ("LossConfig", "objective"): {"r1_interval": None},
    ("LossConfig", "penalty_share"): {"penalty": "estimate"},
    ("LossConfig", "penalty_sigma"): {"penalty": "estimate"},
    ("LossConfig", "centring"): {"objective": "relativistic", "r1_interval": None},
}
# Fields with minimum values that a check across fields refuses.
SHAPES = {
    "base",
    "resolutions",
    "widths",
    "layers",
    "local_layers",
    "channel_base",
    "handover",
    "img_size",
    "full_upto",
}
DEPENDENT = SHAPES | {"z_dim", "w_dim", "mode", "mlp_kernel", "side", "num_layers", "channel_max", "depth"}


def identify(value: Any) -> str:
    return getattr(value, "name", None) or value.__name__


def refusal(config: Any, values: dict[str, Any]) -> ConfigError | None:
    """Return the error that a configuration raises, or None."""
    preset = {"preset": "auto"} if config is TrainConfig else {}
    try:
        config(**preset, **values)
    except ConfigError as error:
        return error
    return None


def is_real(config: Any, name: str) -> bool:
    """Return whether a field holds floats."""
    return "float" in str(hints(config)[name])


def inside_and_outside(config: Any, name: str, bounds: Bounds) -> tuple[list[Any], list[Any]]:
    """Return the values at, just inside and just outside each end of the bounds."""
    if bounds.choices is not None:
        return list(bounds.choices), [f"{bounds.choices[0]}-", ""]
    inside, outside = [], [math.nan] if is_real(config, name) else []
    for end in ENDS:
        edge = getattr(bounds, end)
        if edge is None:
            continue
        sign = 1 if end in ("at_least", "above") else -1
        near = (lambda sign, edge=edge: math.nextafter(edge, sign * math.inf)) if is_real(config, name) else None
        within, beyond = (near(sign), near(-sign)) if near else (edge + sign, edge - sign)
        inside += [within, edge] if end in ("at_least", "at_most") else [within]
        outside += [beyond] if end in ("at_least", "at_most") else [edge, beyond]
    if bounds.at_least is not None and bounds.at_least == bounds.at_most:
        inside = [bounds.at_least]  # the only value
    return inside, outside


@pytest.mark.parametrize(("config", "field"), BOUNDED, ids=identify)
def test_values_at_the_edge_of_the_bounds(config: Any, field: dataclasses.Field[Any]) -> None:
    name, bounds = field.name, bounds_of(config)[field.name]
    is_list = "tuple" in str(hints(config)[name]) or bounds.length is not None
    others = ALSO.get((config.__name__, name), {})
    inside, outside = inside_and_outside(config, name, bounds)
    assert inside
    assert outside

    def given(value: Any) -> dict[str, Any]:
        return {**others, name: (value,) * (bounds.length or 1) if is_list else value}

    for value in outside:
        error = refusal(config, given(value))
        assert error is not None, (name, value)
        assert (error.field, str(bounds) in error.problem) == (name, True), error
        assert error.problem.endswith(bounds.note), error
    for value in inside:
        error = refusal(config, given(value))
        if name in DEPENDENT:
            assert error is None or not error.problem.endswith(f"must be {bounds}"), error
        else:
            assert error is None


@pytest.mark.parametrize(
    ("bounds", "value", "message"),
    [
        (Bounds(at_least=1), 0, "must be at least 1"),
        (Bounds(at_least=1, note="1 is all"), (2, 0), "each must be at least 1; 1 is all"),
        (Bounds(above=0), 0.0, "must be positive"),
        (Bounds(above=2), 2, "must be above 2"),
        (Bounds(at_most=1024), 1025, "must be at most 1,024"),
        (Bounds(below=0.5), 0.5, "must be below 0.5"),
        (Bounds(at_least=0, at_most=1), -0.1, "must lie in 0..1"),
        (Bounds(at_least=0, at_most=0, note="no layers"), 2, "must be 0; no layers"),
        (Bounds(at_least=0, below=1), 1, "must lie in 0..1, 1 excluded"),
        (Bounds(above=0, below=1), math.nan, "must lie in 0..1, 0 excluded, 1 excluded"),
        (Bounds(choices=("stop", "skip")), "halt", "choose one of stop, skip"),
        (Bounds(choices=("a", "b"), note="each once"), ("a", "c"), "'c' is not one of a, b; each once"),
        (Bounds(length=2), (8,), "must be 2 numbers"),
        (Bounds(length=2, at_least=1), 8, "must be 2 numbers"),
        (Bounds(optional=False), None, "cannot be None"),
        (Bounds(at_least=1), None, None),
        (Bounds(at_least=1), "auto", None),
        (Bounds(), math.nan, None),
    ],
)
def test_messages_of_bounds(bounds: Bounds, value: Any, message: str | None) -> None:
    assert bounds.problem(value) == message


def test_bounds_derive_from_the_type_of_the_field() -> None:
    bounds = bounds_of(TrainConfig)
    assert (bounds["precision"].choices, bounds["precision"].optional) == (("fp32", "bf16", "fp16"), True)
    assert (bounds["seed"].choices, bounds["seed"].optional) == (None, False)
    assert bounds_of(RunConfig)["batch_gpu"].choices is None  # a number or the word auto
    assert bounds_of(GENERATORS["stylegan2"])["base"].length == 2
    assert bounds_of(GENERATORS["styleformer"])["widths"].length is None


@pytest.mark.parametrize("config", CONFIGS, ids=identify)
def test_every_field_has_a_description(config: Any) -> None:
    for field in dataclasses.fields(config):
        text = field.metadata["help"]
        assert re.fullmatch(r"[A-Z][^|\n]*\.", text), (field.name, text)
        assert not re.match(r"(What|Which|How|Where|Whoever|Of|Its?|The)\b", text), (field.name, text)
        assert len(text) <= 105, (field.name, text)
        assert ("None:" in text) == bounds_of(config)[field.name].optional or "None in other" in text, field.name


@pytest.mark.parametrize(("text", "size"), [("8", (8, 8)), ("8x12", (8, 12)), ("0", (0, 0))])
def test_sizes_are_parsed(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "8x", "x8", "8x8x8", "-8", "8.5", "8 x 8", "٨", "1" * 19, "8\n"])
def test_invalid_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size such as 8 or 8x12 \(height x width\)"):
        parse_size(text)
