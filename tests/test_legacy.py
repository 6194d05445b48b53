"""Foreign snapshots: rebuilt networks against float64 references that use the foreign tensors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_files import (
    LAYERS,
    STYLEGAN2_ARGUMENTS,
    Call,
    Name,
    Tensors,
    W,
    Z,
    discriminator_shapes,
    draw,
    dumps,
    easy_dict,
    mapping_shapes,
    module,
    styleformer_shapes,
    stylegan2_module,
    stylegan2_shapes,
    write,
)
from foreign_references import arrays, assert_same_images, refused, styleformer_state, stylegan2_state
from reference_styleformer import ref_styleformer
from reference_stylegan2 import ref_stylegan2, ref_stylegan2_discriminator

import legacy
import training.snapshots.snapshot
from dnnlib.config import UserError, from_json, to_json
from training.config import TrainConfig
from training.networks.styleformer import StyleformerConfig
from training.networks.stylegan2 import StyleGAN2Config
from training.networks.stylegan2_discriminator import StyleGAN2DiscriminatorConfig
from training.snapshots.foreign import TRANSFORMS, WHOLE_BATCH
from training.snapshots.snapshot import Snapshot, save_network


def load_generator(path: Path, tensors: Tensors, **kwargs: Any) -> Snapshot:
    return legacy.load_network(write(path, {"G_ema": module("Generator", tensors, **kwargs)}))


STYLEFORMERS: dict[str, tuple[StyleformerConfig, dict[str, Any]]] = {
    "plain": (StyleformerConfig(widths=(12, 8), layers=(1, 3), depth=4), {}),
    "linformer": (StyleformerConfig(widths=(8, 4, 4), layers=(1, 1, 2), depth=4, linformer=True), {"linformer": True}),
    "conditional": (StyleformerConfig(widths=(8,), layers=(2,), c_dim=3), {}),
    "one channel": (StyleformerConfig(widths=(8, 6), layers=(2, 1), img_channels=1), {}),
    "heads": (StyleformerConfig(widths=(8, 4), layers=(1, 1), minimum_head=4), {"minimum_head": 4}),
    "tight clamp": (StyleformerConfig(widths=(8,), layers=(2,), conv_clamp=0.5), {}),
    "base 12": (StyleformerConfig(widths=(6, 4), layers=(1, 1), base=(12, 12)), {}),
}


@pytest.mark.parametrize("name", STYLEFORMERS)
def test_a_foreign_styleformer_equals_the_reference(name: str, tmp_path: Path) -> None:
    config, extra = STYLEFORMERS[name]
    config = dataclasses.replace(config, z_dim=Z, w_dim=W, mapping_layers=LAYERS)
    side, channels = config.base[0], config.img_channels
    shapes = mapping_shapes(Z, config.c_dim, W, LAYERS)
    shapes |= styleformer_shapes(config.widths, config.layers, side, W, channels, bool(config.linformer))
    tensors = draw(shapes)
    twice = {key.replace(".enc.proj", ".proj"): x for key, x in tensors.items() if key.endswith("proj_weight")}
    synthesis = {"depth": config.depth, "num_layers": list(config.layers), "conv_clamp": config.conv_clamp, **extra}
    snapshot = load_generator(
        tmp_path / "theirs.pkl",
        tensors | twice,
        z_dim=Z,
        c_dim=config.c_dim,
        w_dim=W,
        img_resolution=config.img_size[0],
        img_channels=channels,
        mapping_kwargs=easy_dict(num_layers=LAYERS),
        synthesis_kwargs=easy_dict(**synthesis),
    )
    assert snapshot.config.generator == config
    state = styleformer_state(tensors, config)
    assert_same_images(snapshot, lambda ws, noise: ref_styleformer(ws, state, config, noise), tensors)


STYLEGAN2S: dict[str, StyleGAN2Config] = {
    "skip": StyleGAN2Config(),
    "resnet": StyleGAN2Config(architecture="resnet"),
    "orig": StyleGAN2Config(architecture="orig"),
    "conditional": StyleGAN2Config(c_dim=3),
    "one channel": StyleGAN2Config(img_channels=1),
    "tight clamp": StyleGAN2Config(architecture="resnet", conv_clamp=0.5),
    "no clamp": StyleGAN2Config(conv_clamp=None),
}


@pytest.mark.parametrize("name", STYLEGAN2S)
def test_a_foreign_stylegan2_equals_the_reference(name: str, tmp_path: Path) -> None:
    small = {"z_dim": Z, "w_dim": W, "mapping_layers": LAYERS, "resolutions": 3, "channel_base": 48, "channel_max": 5}
    config: StyleGAN2Config = dataclasses.replace(STYLEGAN2S[name], **small)  # type: ignore[arg-type]
    shapes = mapping_shapes(Z, config.c_dim, W, LAYERS)
    shapes |= stylegan2_shapes(16, 48, 5, W, config.img_channels, config.architecture)
    tensors = draw(shapes)
    synthesis = {"channel_base": 48, "channel_max": 5, "num_fp16_res": 2, "conv_clamp": config.conv_clamp}
    snapshot = load_generator(
        tmp_path / "network-snapshot-000200.pkl",
        tensors,
        z_dim=Z,
        c_dim=config.c_dim,
        w_dim=W,
        img_resolution=16,
        img_channels=config.img_channels,
        mapping_kwargs=easy_dict(num_layers=LAYERS),
        synthesis_kwargs=easy_dict(**synthesis, architecture=config.architecture),
    )
    assert snapshot.config.generator == config
    assert (snapshot.config.precision, snapshot.config.reduced_from, snapshot.kimg) == ("fp16", 8, 200)
    state = stylegan2_state(tensors)
    assert_same_images(snapshot, lambda ws, noise: ref_stylegan2(ws, state, config, noise), tensors)


DISCRIMINATORS: dict[str, dict[str, Any]] = {
    "orig": {"architecture": "orig"},
    "skip": {"architecture": "skip", "conv_clamp": 0.7},
    "resnet": {"architecture": "resnet", "conv_clamp": 0.7},
    "group of 2": {"mbstd_group_size": 2},
    "no minibatch-std": {"mbstd_group_size": 0},
    "conditional": {"c_dim": 3, "mapping_layers": 8},
    "conditional, cmap_dim": {"c_dim": 3, "cmap_dim": 7, "mapping_layers": 2},
    "conditional, embedding alone": {"c_dim": 3, "mapping_layers": 0},
    "one group": {"mbstd_group_size": WHOLE_BATCH},
}


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_a_foreign_discriminator_equals_the_reference(name: str, tmp_path: Path) -> None:
    small = {"img_size": (16, 16), "img_channels": 2, "channel_base": 48, "channel_max": 8, "conv_clamp": None}
    config = StyleGAN2DiscriminatorConfig(**small | DISCRIMINATORS[name])  # type: ignore[arg-type]
    c_dim, width = config.c_dim, config.cmap_dim or 8
    tensors = discriminator_tensors(config)
    group = None if config.mbstd_group_size == WHOLE_BATCH else config.mbstd_group_size
    epilogue = {"mbstd_num_channels": 0} if group == 0 else {"mbstd_group_size": group}
    # Snapshots converted from TensorFlow have a learning rate even for a mapping network without layers.
    mapping = {"num_layers": 0, "lr_multiplier": 0.1, "w_avg_beta": None} if config.mapping_layers == 0 else {}
    if not c_dim:
        mapping = {"num_layers": 0, "layer_features": 512, "lr_multiplier": 0.1}
    elif config.mapping_layers == 2:
        mapping = {"num_layers": 2}
    D = module(
        "Discriminator",
        tensors,
        frozen=("weight",),  # as after training with Freeze-D
        c_dim=c_dim,
        img_resolution=16,
        img_channels=2,
        architecture=config.architecture,
        channel_base=48,
        channel_max=8,
        conv_clamp=config.conv_clamp,
        cmap_dim=config.cmap_dim,
        block_kwargs=easy_dict(freeze_layers=1),
        mapping_kwargs=easy_dict(**mapping),
        epilogue_kwargs=easy_dict(**epilogue),
    )
    G_ema = stylegan2_module(c_dim=c_dim, img_channels=2)
    snapshot = legacy.load_network(write(tmp_path / "theirs.pkl", {"G_ema": G_ema, "D": D}))
    assert snapshot.config.discriminator == config
    assert snapshot.config.freeze_layers == 1

    names = {r"mapping\.fc": "mapping.layers.", r"^b4\.(conv|fc|out)\.": r"epilogue.\1."}
    for level, side in enumerate((16, 8, 4)):
        names |= {rf"^b{side}\.fromrgb": f"fromrgb.{level}", rf"^b{side}\.": f"blocks.{level}."}
    state = {key: x for key, x in arrays(tensors, names).items() if not key.endswith("resample_filter")}
    img = 3 * torch.randn(4, 2, 16, 16, generator=torch.Generator().manual_seed(3))
    c = torch.eye(3)[[0, 2, 1, 0]] if c_dim else None
    expected = ref_stylegan2_discriminator(
        img.double().numpy(), None if c is None else c.double().numpy(), state, config
    )
    logits = snapshot.D(img, c).double().numpy()
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.ptp(expected) > 0.002
    assert width == snapshot.D.cmap_dim


def discriminator_tensors(config: StyleGAN2DiscriminatorConfig) -> Tensors:
    width = config.cmap_dim or 8
    out = width if config.c_dim else 1
    mbstd = bool(config.mbstd_group_size)
    shapes = discriminator_shapes(16, 48, 8, config.img_channels, config.architecture, mbstd, out)
    if config.c_dim:
        shapes |= mapping_shapes(0, config.c_dim, width, config.mapping_layers, w_avg=False)
    return draw(shapes, seed=7)


@pytest.fixture
def full_snapshot(tmp_path: Path) -> Path:
    """Snapshot with G, D, G_ema and an augmentation pipe."""
    config = StyleGAN2DiscriminatorConfig(img_channels=3, img_size=(16, 16), channel_base=48, channel_max=8)
    kwargs: dict[str, Any] = {"c_dim": 0, "img_resolution": 16, "img_channels": 3, "conv_clamp": 256}
    D = module("Discriminator", discriminator_tensors(config), **kwargs, channel_base=48, channel_max=8)
    transforms = [name for group in ("blit", "geom", "color") for name in TRANSFORMS[group]]
    augment = module("AugmentPipe", {"p": torch.tensor(0.25)}, (), **dict.fromkeys(transforms, 1))
    content = {"G": stylegan2_module(), "D": D, "G_ema": stylegan2_module(), "augment_pipe": augment}
    return write(tmp_path / "network-snapshot-000120.pkl", content)


def test_a_foreign_snapshot_can_be_saved_in_the_native_format(full_snapshot: Path, tmp_path: Path) -> None:
    snapshot = legacy.load_network(full_snapshot)
    config = snapshot.config
    assert (snapshot.nimg, snapshot.ada_p, config.augment.pipe, config.augment.mode) == (120_000, 0.25, "bgc", "ada")
    assert (config.data.path, config.data.mirror, config.preset) == ("their.zip", True, "foreign")
    assert from_json(TrainConfig, json.loads(json.dumps(to_json(config)))) == config

    networks = {name: getattr(snapshot, name) for name in ("G", "D", "G_ema")}
    save_network(tmp_path / "ours.pkl", config=config, **networks, nimg=snapshot.nimg, ada_p=snapshot.ada_p)
    again = training.snapshots.snapshot.load_network(tmp_path / "ours.pkl")
    assert again.config == config
    for name, network in networks.items():
        for key, x in network.state_dict().items():
            assert torch.equal(x, getattr(again, name).state_dict()[key])


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("numpy_core", ["numpy.core", "numpy._core"])
def test_pickle_protocols_and_both_numpy_names_are_read(protocol: int, numpy_core: str, tmp_path: Path) -> None:
    path = write(tmp_path / "n.pkl", {"G_ema": stylegan2_module()}, protocol=protocol, numpy_core=numpy_core)
    assert numpy_core.encode() in path.read_bytes()
    assert legacy.load_network(path).G_ema.img_shape == (3, 16, 16)


def test_native_snapshots_are_read_too() -> None:
    shapes = Path(__file__).parent.parent / "docs" / "shapes.pkl"
    ours, same = legacy.load_network(shapes), training.snapshots.snapshot.load_network(shapes)
    assert ours.config == same.config
    with pytest.raises(UserError, match="no such file"):
        legacy.load_network("missing.pkl")


def test_the_native_reader_suggests_legacy_for_other_files(tmp_path: Path) -> None:
    theirs = write(tmp_path / "n.pkl", {"G_ema": stylegan2_module()})
    for path in (theirs, tmp_path):  # a pickle, a folder
        with pytest.raises(UserError, match=f"{path}: not a snapshot file of this project: legacy.load_network "):
            training.snapshots.snapshot.load_network(path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(full_snapshot: Path, tmp_path: Path, value: float) -> None:
    snapshot, path = legacy.load_network(full_snapshot), tmp_path / "n.pkl"
    snapshot.D.epilogue.fc.bias[3] = value
    save_network(path, config=snapshot.config, D=snapshot.D, G_ema=snapshot.G_ema)
    refused(path, "D: epilogue.fc.bias contains non-finite values", "use an earlier snapshot")
    shapes = mapping_shapes(Z, 0, W, LAYERS) | stylegan2_shapes(16, 48, 5, W, 3, "skip")
    theirs = module("Generator", draw(shapes) | {"mapping.w_avg": torch.full([W], value)}, **STYLEGAN2_ARGUMENTS)
    refused(write(path, {"G_ema": theirs}), "G_ema: mapping.w_avg contains non-finite values")


GENERATOR_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown argument": ({"magnitude_ema_beta": 0.999}, "G_ema: unknown argument magnitude_ema_beta"),
    "control characters": ({"a\n\033[2J": 1}, "unknown argument a\\n\\x1b[2J"),
    "many": ({f"argument {i}": 1 for i in range(9000)}, "unknown argument argument 0, argument 1, "),
    "nested unknown argument": ({"mapping_kwargs": {"x": 1}}, "G_ema.mapping_kwargs: unknown argument x"),
    "other learning rate": ({"mapping_kwargs": {"num_layers": 2, "lr_multiplier": 0.1}}, "lr_multiplier=0.1"),
    "other activation": ({"mapping_kwargs": {"num_layers": 2, "activation": "relu"}}, "activation='relu'"),
    "hidden width": ({"mapping_kwargs": {"num_layers": 2, "layer_features": 9}}, "layer_features=9"),
    "no noise": ({"synthesis_kwargs": {"use_noise": False}}, "use_noise=False"),
    "other filter": ({"synthesis_kwargs": {"resample_filter": [1, 2, 1]}}, "resample_filter=[1, 2, 1]"),
    "architecture": ({"synthesis_kwargs": {"architecture": "dense"}}, "architecture='dense'"),
    "a tensor instead of a number": ({"z_dim": torch.zeros(3)}, "z_dim=of type Tensor"),
    "None instead of a number": ({"z_dim": None}, "z_dim=None"),
    "huge": ({"z_dim": 10**9}, "z_dim=1000000000"),
    "endless": ({"mapping_kwargs": {"num_layers": 10**9}}, "num_layers=1000000000"),
    "size": ({"img_resolution": 48}, "not of 48"),
    "widths": ({"synthesis_kwargs": {"channel_max": 4}}, "(5, 4, 4), but its arguments require (4, 4, 4)"),
    "no arguments": ({"mapping_kwargs": 5}, "not keyword arguments"),
    "fewer layers": ({"mapping_kwargs": {"num_layers": 1}}, "mapping.fc1.weight does not exist"),
    "more layers": ({"mapping_kwargs": {"num_layers": 3}}, "mapping.fc2.weight is missing"),
}


@pytest.mark.parametrize("name", GENERATOR_REFUSALS)
def test_unsupported_generator_arguments_are_refused_by_name(name: str, tmp_path: Path) -> None:
    changes, text = GENERATOR_REFUSALS[name]
    refused(write(tmp_path / "n.pkl", {"G_ema": stylegan2_module(**changes)}), text)


def test_missing_unknown_and_mismatched_tensors_are_refused(tmp_path: Path) -> None:
    shapes = mapping_shapes(Z, 0, W, LAYERS) | stylegan2_shapes(16, 48, 5, W, 3, "skip")
    kwargs = STYLEGAN2_ARGUMENTS
    tensors = draw(shapes)
    changed: dict[str, Tensors] = {
        "synthesis.b8.conv0.bias is missing": {k: x for k, x in tensors.items() if k != "synthesis.b8.conv0.bias"},
        "synthesis.b8.extra does not exist": tensors | {"synthesis.b8.extra": torch.zeros(1)},
        "resample_filter does not exist": tensors | {"synthesis.b8.resample_filter": torch.ones(4, 4)},
        "is not a floating-point tensor": tensors
        | {"synthesis.b8.conv0.noise_const": torch.zeros(8, 8, dtype=torch.int64)},
    }
    for text, altered in changed.items():
        refused(write(tmp_path / "n.pkl", {"G_ema": module("Generator", altered, **kwargs)}), text)
    without = {**tensors, "synthesis.b8.resample_filter": None, "mapping.unused": None}
    path = write(tmp_path / "n.pkl", {"G_ema": module("Generator", without, **kwargs)})  # type: ignore[arg-type]
    assert legacy.load_network(path).G_ema.num_ws == 6


def test_a_shared_tensor_is_refused(tmp_path: Path) -> None:
    """If blocks could share matrices, a 1 MB file could describe networks that fill all memory."""
    shapes = mapping_shapes(Z, 0, W, LAYERS) | stylegan2_shapes(16, 48, 5, W, 3, "skip")
    tensors = draw(shapes)
    G_ema = module("Generator", tensors, **STYLEGAN2_ARGUMENTS)
    layers = G_ema.parts[1][0]["state"]["_modules"]["mapping"].parts[1][0]["state"]["_modules"]
    bias = layers["fc0"].parts[1][0]["state"]["_parameters"]["bias"]
    layers["fc1"].parts[1][0]["state"]["_parameters"]["bias"] = bias
    refused(write(tmp_path / "n.pkl", {"G_ema": G_ema}), "mapping.fc0.bias and mapping.fc1.bias are the same tensor")


def test_files_of_other_code_bases_are_identified(tmp_path: Path) -> None:
    alias_free = module("Generator", {"synthesis.input.weight": torch.zeros(2, 2)}, z_dim=Z)
    refused(write(tmp_path / "n.pkl", {"G_ema": alias_free}), "StyleGAN3")
    array = Call(Name("numpy.core.multiarray", "_reconstruct"), (Name("numpy", "ndarray"), (0,), b"b"))
    refused(write(tmp_path / "n.pkl", {"G_ema": array}), "G_ema is not a network: it refers to numpy.core.multiarray")
    tensorflow = Call(Name("dnnlib.tflib.network", "Network"), ())
    (tmp_path / "tf.pkl").write_bytes(dumps((tensorflow, tensorflow, tensorflow)))
    refused(tmp_path / "tf.pkl", "TensorFlow")
    refused(
        write(tmp_path / "n.pkl", {"G_ema": module("Encoder", {}, z_dim=Z)}), "of class Encoder, expected Generator"
    )
    refused(write(tmp_path / "n.pkl", {"G_ema": None}), "not a snapshot of Styleformer, StyleGAN2-ADA or")
    other = write(tmp_path / "n.pkl", {"G_ema": stylegan2_module(), "G": stylegan2_module(img_channels=1), "E": None})
    snapshot = legacy.load_network(other)
    assert snapshot.left_out == {"G": "G and G_ema have different arguments", "E": "unknown"}
    assert snapshot.G is None
    (tmp_path / "page.pkl").write_text("<!DOCTYPE html><html>Sign in</html>")
    refused(tmp_path / "page.pkl", "an HTML page")
    (tmp_path / "list.pkl").write_bytes(dumps([1, 2]))
    refused(tmp_path / "list.pkl", "not a snapshot of Styleformer")


@pytest.mark.parametrize(
    ("transforms", "expected"),
    [
        ({}, "noaug"),
        ({"xflip": 1, "rotate90": 1, "xint": 1}, "blit"),
        ({"imgfilter": 1, "imgfilter_bands": [1, 1, 1, 1]}, "filter"),
        ({"xflip": 1}, "some of xflip, rotate90, xint are on"),
        ({"xflip": 0.5}, "xflip=0.5"),
        ({"noise": 1, "cutout": 1}, "noise, cutout together match none of"),
        ({"noise": 1, "noise_std": 0.2}, "noise_std=0.2"),
        ({"sharpen": 1}, "unknown argument sharpen"),
    ],
)
def test_augmentation_pipes_are_recognised(transforms: dict[str, Any], expected: str, tmp_path: Path) -> None:
    augment = module("AugmentPipe", {"p": torch.tensor(1.5)}, **transforms)
    path = write(tmp_path / "n.pkl", {"G_ema": stylegan2_module(), "augment_pipe": augment})
    snapshot = legacy.load_network(path)
    if " " in expected or "=" in expected:
        assert expected in snapshot.left_out["augment_pipe"]
        assert (snapshot.config.augment.mode, snapshot.ada_p) == ("noaug", 0)
        return
    config = snapshot.config.augment
    assert expected in (config.mode, config.pipe)
    assert snapshot.ada_p == (0 if config.mode == "noaug" else 1)
