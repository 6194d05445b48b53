"""dnnlib.config, the presets and `resolve`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from dnnlib.config import ConfigError, differences, from_json, override, to_json
from training.augment.pipe import AugmentConfig
from training.config import (
    ADDED_FIELDS,
    PRESETS,
    Environment,
    RunConfig,
    TrainConfig,
    read_config,
    resolve,
)
from training.phases import AdamConfig

CIFAR = Environment(img_shape=(3, 32, 32), c_dim=0)
# Values that make a configuration valid without the newer fields.
BEFORE_OBJECTIVES: dict[str, Any] = {"loss.objective": "logistic", "augment.mode": "ada", "augment.policy": None}


@dataclass(frozen=True, kw_only=True)
class Inner:
    count: int = 1
    sizes: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError("count", self.count, "cannot be negative")


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    rate: float | None = None


def test_override_replaces_only_the_given_fields() -> None:
    changed = override(Outer(), {"inner.sizes": (3,), "rate": 0.5})
    assert changed == Outer(inner=Inner(count=1, sizes=(3,)), rate=0.5)


def test_override_errors_name_the_full_path() -> None:
    with pytest.raises(ConfigError) as refused:
        override(Outer(), {"inner.count": -1})
    assert refused.value.field == "inner.count"
    with pytest.raises(ConfigError, match=r"inner\.cuont=1: Inner has no such field; it has count, sizes"):
        override(Outer(), {"inner.cuont": 1})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_json(name: str) -> None:
    config = resolve(PRESETS[name], Environment(img_shape=(3, *_size(PRESETS[name])), c_dim=0))
    text = json.dumps(to_json(config))
    assert from_json(TrainConfig, json.loads(text)) == config
    assert config.preset == name


def _size(config: TrainConfig) -> tuple[int, int]:
    try:
        return config.generator.img_size
    except ConfigError:  # not yet resolved
        return (128, 128)


def test_invalid_json_configurations_are_refused() -> None:
    good = to_json(Outer(inner=Inner(count=2)))
    with pytest.raises(ConfigError, match="unknown key"):
        from_json(Outer, good | {"speed": 1})
    with pytest.raises(ConfigError, match="missing"):
        from_json(Outer, {"inner": good["inner"]})
    with pytest.raises(ConfigError, match=r"inner\.count='2': expected int"):
        from_json(Outer, good | {"inner": {"count": "2", "sizes": [1]}})
    with pytest.raises(ConfigError, match=r"inner\.sizes"):
        from_json(Outer, good | {"inner": {"count": 2, "sizes": [1, "a"]}})


@pytest.mark.parametrize(
    ("field", "value", "is_out_of_range"),
    [
        ("snapshot_ticks", 3.5, False),
        ("snapshot_ticks", True, False),
        ("total_kimg", "x", False),
        ("keep_every", "x", False),
        ("snapshot_ticks", 2**63, True),
        ("total_kimg", 1e39, True),
        ("keep_every", float("inf"), True),
    ],
)
def test_the_range_is_reported_only_if_the_type_is_right(field: str, value: Any, is_out_of_range: bool) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}=.*: expected ") as caught:
        from_json(RunConfig, {**to_json(RunConfig()), field: value})
    assert ("fit into 64 bits" in str(caught.value)) == is_out_of_range


def test_numpy_floats_are_accepted() -> None:
    assert from_json(RunConfig, {**to_json(RunConfig()), "total_kimg": np.float64(2.5)}).total_kimg == 2.5


@pytest.mark.parametrize("preset", ["tiny", "transgan-cifar"])
def test_old_configurations_get_the_old_defaults_of_new_fields(preset: str) -> None:
    config = resolve(override(PRESETS[preset], BEFORE_OBJECTIVES), CIFAR)
    data = json.loads(json.dumps(to_json(config)))
    removed = {}
    for path, value in ADDED_FIELDS.items():
        *parents, name = path.split(".")
        part = data[parents[0]] if parents else data
        if name in part:
            del part[name]
            removed[path] = value
    assert ("generator.attention_noise" in removed) == (preset == "transgan-cifar")
    assert read_config(data) == override(config, removed)
    with pytest.raises(ConfigError, match="missing"):
        read_config({key: value for key, value in data.items() if key != "seed"})


def test_old_transgan_configurations_have_no_noise() -> None:
    config = resolve(PRESETS["transgan-cifar"], CIFAR)
    data = json.loads(json.dumps(to_json(config)))
    new = {"generator": ["attention_noise"], "discriminator": ["attention_noise"]}
    for part, names in {**new, "augment": ["translation", "cutout_p", "filter_p", "hue_p"]}.items():
        for name in names:
            del data[part][name]
    old = read_config(data)
    assert (old.augment.translation, old.augment.cutout_p, old.augment.filter_p, old.augment.hue_p) == (0.125, 1, 1, 1)
    for network in (old.generator.build, old.discriminator.build):
        with torch.device("meta"):
            assert not any("noise" in name for name in network().state_dict())


@pytest.mark.parametrize("family", [None, 3, [], {}, "biggan"])
def test_an_unknown_family_in_a_file_is_refused(family: Any) -> None:
    data = to_json(resolve(PRESETS["tiny"], Environment(img_shape=(3, 32, 32), c_dim=0)))
    for part in ("generator", "discriminator"):
        with pytest.raises(ConfigError, match=rf"{part}\.family=.*: unknown family; choose one of style"):
            read_config(data | {part: data[part] | {"family": family}})


def test_precision_and_layout_follow_the_device() -> None:
    def resolved(**machine: bool) -> tuple[str | None, bool | None]:
        config = resolve(PRESETS["cifar"], Environment(img_shape=(3, 32, 32), c_dim=0, **machine))
        return config.precision, config.channels_last

    assert resolved() == ("fp32", False)
    assert resolved(on_gpu=True) == ("fp32", False)
    assert resolved(on_gpu=True, has_bf16=True) == ("bf16", True)
    with pytest.raises(ConfigError, match=r"precision='int8'.*fp32, bf16, fp16"):
        override(PRESETS["cifar"], {"precision": "int8"})


@pytest.mark.parametrize(
    ("side", "on_gpu", "options", "graphs"),
    [
        (32, True, {}, True),
        (64, True, {}, True),
        (128, True, {}, False),
        (128, True, {"run.graphs": True}, True),
        (32, True, {"run.graphs": False}, False),
        (32, True, {"run.recompute": True}, False),
        (32, False, {}, False),
    ],
)
def test_graphs_are_the_default_for_small_images(
    side: int, on_gpu: bool, options: dict[str, bool], graphs: bool
) -> None:
    config = override(PRESETS["auto"], options)
    assert resolve(config, Environment(img_shape=(3, side, side), c_dim=0, on_gpu=on_gpu)).run.graphs is graphs


def test_graphs_on_a_cpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="need a GPU"):
        resolve(override(PRESETS["cifar"], {"run.graphs": True}), Environment(img_shape=(3, 32, 32), c_dim=0))
    with pytest.raises(ConfigError, match="omit --grad-checkpoint"):
        override(PRESETS["cifar"], {"run.graphs": True, "run.recompute": True})


def test_differences_lists_changed_leaves() -> None:
    old, new = to_json(Outer()), to_json(Outer(inner=Inner(count=5)))
    assert differences(old, new) == ["inner.count: 1 -> 5"]


@pytest.mark.parametrize(
    ("resolution", "gpus", "batch", "gamma", "channel_base"),
    [
        # batch = max(min(gpus min(4096//R, 32), 64), gpus); gamma = 0.0002 R^2 / batch; 16384 channels below 512 px
        (32, 1, 32, 0.0002 * 32**2 / 32, 16384),
        (128, 4, 64, 0.0002 * 128**2 / 64, 16384),
        (256, 1, 16, 0.0002 * 256**2 / 16, 16384),
        (512, 8, 64, 0.0002 * 512**2 / 64, 32768),
    ],
)
def test_auto_follows_resolution_and_gpus(
    resolution: int, gpus: int, batch: int, gamma: float, channel_base: int
) -> None:
    config = override(PRESETS["auto"], {"run.num_gpus": gpus})
    resolved = resolve(config, Environment(img_shape=(3, resolution, resolution), c_dim=0))
    assert resolved.batch_size == batch
    assert resolved.run.batch_gpu == batch // gpus
    assert resolved.loss.r1_gamma == pytest.approx(gamma)
    assert resolved.ema.kimg == pytest.approx(batch * 10 / 32)
    assert resolved.g_optimizer.lr == 0.0025
    assert to_json(resolved)["discriminator"]["channel_base"] == channel_base
    assert resolved.generator.img_size == (resolution, resolution)


# StyleGAN2-ADA's presets: side, batch, group of minibatch-std, feature maps, learning rate, gamma, EMA kimg and its
# ramp-up, depth of the mapping, kimg. The Styleformer paper's models were trained as "cifar".
SCHEDULES = {
    "auto": (256, 64, 4, 0.5, 0.0025, 0.0002 * 256**2 / 64, 20, 0.05, 2, 25_000),
    "stylegan2": (256, 32, 4, 1, 0.002, 10, 10, None, 8, 25_000),
    "paper256": (256, 64, 8, 0.5, 0.0025, 1, 20, None, 8, 25_000),
    "paper512": (512, 64, 8, 1, 0.0025, 0.5, 20, None, 8, 25_000),
    "paper1024": (1024, 32, 4, 1, 0.002, 2, 10, None, 8, 25_000),
    "cifar": (32, 32, 32, 1, 0.0025, 0.01, 500, 0.05, 2, 100_000),
    "cifar-stylegan2": (32, 64, 32, 1, 0.0025, 0.01, 500, 0.05, 2, 100_000),
    "cifar-large": (32, 32, 32, 1, 0.0025, 0.01, 500, 0.05, 2, 100_000),
    "stl10-medium": (48, 32, 32, 1, 0.0025, 0.01, 500, 0.05, 2, 100_000),
    "celeba64-l": (64, 32, 32, 1, 0.0025, 0.01, 500, 0.05, 2, 100_000),
    "church128-l": (128, 32, 32, 1, 0.0025, 0.01, 500, 0.05, 2, 100_000),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_presets_have_the_published_schedule(name: str) -> None:
    side, batch, group, fmaps, lr, gamma, ema_kimg, rampup, depth, kimg = SCHEDULES[name]
    config = override(PRESETS[name], {"run.num_gpus": 8 if name == "auto" else 1})
    config = resolve(config, Environment(img_shape=(3, side, side), c_dim=0))
    D, loss, is_cifar = to_json(config)["discriminator"], config.loss, kimg == 100_000
    assert (config.batch_size, D["mbstd_group_size"], D["channel_base"]) == (batch, group, fmaps * 32768)
    assert config.g_optimizer == config.d_optimizer == AdamConfig(lr=lr, beta1=0.0, beta2=0.99, eps=1e-8)
    assert loss.r1_gamma == pytest.approx(gamma)
    assert (loss.objective, loss.n_critic, loss.r1_interval, loss.pl_interval) == ("logistic", 1, 16, 4)
    assert (loss.pl_weight, loss.style_mixing) == ((0, 0) if is_cifar else (2, 0.9))
    assert (config.ema.kimg, config.ema.rampup) == (ema_kimg, rampup)
    assert config.generator.mapping_layers == depth
    assert (D["architecture"], config.data.mirror) == ("orig" if is_cifar else "resnet", False)
    augment = AugmentConfig(mode="ada", pipe="bgc", target=0.6, ada_kimg=500, ada_interval=4)
    assert replace(config.augment, max_p=1.0) == augment
    assert config.augment.max_p == (0.7 if name in ("celeba64-l", "church128-l") else 1)
    assert (config.run.total_kimg, config.run.tick_kimg, config.run.snapshot_ticks) == (kimg, 4, 50)


def test_resolve_takes_channels_labels_and_size_from_the_data() -> None:
    resolved = resolve(PRESETS["auto"], Environment(img_shape=(1, 64, 64), c_dim=7))
    assert (resolved.generator.img_channels, resolved.discriminator.img_channels) == (1, 1)
    assert (resolved.generator.c_dim, resolved.discriminator.c_dim) == (7, 7)
    assert resolved.discriminator.img_size == (64, 64)


def test_an_indivisible_batch_is_refused_with_a_suggestion() -> None:
    config = override(PRESETS["cifar"], {"batch_size": 30, "run.num_gpus": 4})
    with pytest.raises(ConfigError, match=r"multiple of 32 .* --batch=32"):
        resolve(config, CIFAR)
    uneven = override(PRESETS["cifar"], {"discriminator.mbstd_group_size": 8, "batch_size": 36})
    with pytest.raises(ConfigError, match="minibatch-std groups of 8"):
        resolve(uneven, CIFAR)


def test_a_micro_batch_of_one_cannot_have_path_length() -> None:
    config = override(PRESETS["auto"], {"batch_size": 4, "run.batch_gpu": 1})
    with pytest.raises(ConfigError, match="path length"):
        resolve(config, CIFAR)


def test_an_unsupported_image_size_is_refused_with_the_supported() -> None:
    with pytest.raises(ConfigError, match=r"12"):
        resolve(PRESETS["cifar"], Environment(img_shape=(3, 48, 48), c_dim=0))
