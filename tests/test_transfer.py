"""Transfer learning between networks of different shapes: copied tensors, partial copies, refusals."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnnlib.config import ConfigError, UserError, from_json, to_json
from training.networks.r3gan import R3GANConfig
from training.networks.styleformer import StyleformerConfig
from training.networks.styleformer_c import StyleformerCConfig
from training.networks.styleformer_discriminator import StyleformerDiscriminatorConfig
from training.networks.stylegan2 import StyleGAN2Config
from training.networks.stylegan2_discriminator import StyleGAN2DiscriminatorConfig
from training.networks.transgan import TransGANConfig
from training.snapshots.transfer import Origin, check_frozen, copy_weights, fit, places

G32 = StyleformerConfig(z_dim=8, w_dim=8, widths=(24, 16, 8), layers=(1, 2, 1))
G64 = dataclasses.replace(G32, widths=(24, 16, 8, 8), layers=(1, 2, 1, 1))
D32 = StyleGAN2DiscriminatorConfig(img_size=(32, 32), channel_base=256, channel_max=16)
D64 = dataclasses.replace(D32, img_size=(64, 64))


def build(config: Any, seed: int) -> Any:
    """Return a network in which no two tensors are equal, not even initial biases."""
    torch.manual_seed(seed)
    network: nn.Module = config.build()
    with torch.no_grad():
        for x in network.state_dict().values():
            x.copy_(torch.randn(x.shape))
    return network


def pair(source: Any, target: Any) -> tuple[Any, Any]:
    return build(source, 0), build(target, 1)


def test_places_use_grids_instead_of_indices() -> None:
    assert places(build(D64, 0))["blocks.1.conv0.weight"] == "blocks.32x32.conv0.weight"
    assert places(build(D32, 0))["blocks.0.conv0.weight"] == "blocks.32x32.conv0.weight"
    assert places(build(D32, 0))["fromrgb.0.bias"] == "fromrgb.32x32.bias"
    G = build(G32, 0)
    assert places(G)["synthesis.stages.1.blocks.1.bias"] == "synthesis.stages.16x16.blocks.1.bias"
    assert set(places(G)) == set(G.state_dict())
    convs = places(build(StyleGAN2Config(resolutions=2, channel_base=64), 0))
    assert convs["synthesis.stages.0.convs.0.weight"] == "synthesis.stages.4x4.convs.same.weight"
    assert convs["synthesis.stages.1.convs.0.weight"] == "synthesis.stages.8x8.convs.up.weight"
    assert convs["synthesis.stages.1.convs.1.weight"] == "synthesis.stages.8x8.convs.same.weight"


@pytest.mark.parametrize("architecture", ["orig", "skip", "resnet"])
@pytest.mark.parametrize("is_up", [True, False])
def test_blocks_are_copied_to_the_same_grid(architecture: Any, is_up: bool) -> None:
    """Indices are counted by hand: block i of the smaller network is block i + 1 of the larger network."""
    small, large = (dataclasses.replace(config, architecture=architecture) for config in (D32, D64))
    source, target = pair(small, large) if is_up else pair(large, small)
    copied = copy_weights(source, target, "D")
    low, high = (source, target) if is_up else (target, source)
    for i in range(3):
        for key, x in low.blocks[i].state_dict().items():
            assert torch.equal(x, high.blocks[i + 1].state_dict()[key]), key
    for key, x in low.epilogue.state_dict().items():
        assert torch.equal(x, high.epilogue.state_dict()[key])
    if architecture == "skip":
        assert torch.equal(low.fromrgb[0].weight, high.fromrgb[1].weight)
    grid = "64x64" if is_up else "32x32"
    expected = {f"fromrgb.{grid}.weight", f"fromrgb.{grid}.bias"} if is_up or architecture != "skip" else set()
    expected |= {f"blocks.{grid}.{key}" for key in high.blocks[0].state_dict()} if is_up else set()
    assert set(copied.new) == expected


@pytest.mark.parametrize("is_up", [True, False])
def test_encoder_blocks_of_d_are_copied_to_the_same_grid(is_up: bool) -> None:
    small = StyleformerDiscriminatorConfig(img_size=(16, 16), layers=(1, 1), channel_base=64, channel_max=16, depth=4)
    large = dataclasses.replace(small, img_size=(32, 32), layers=(1, 1, 1))
    source, target = pair(small, large) if is_up else pair(large, small)
    copied = copy_weights(source, target, "D")
    low, high = (source, target) if is_up else (target, source)
    for i in range(2):
        for key, x in low.stages[i].state_dict().items():
            assert torch.equal(x, high.stages[i + 1].state_dict()[key]), key
    assert {name.split(".")[1] for name in copied.new if name.startswith("stages")} == ({"16x16"} if is_up else set())


def test_stages_of_a_transgan_are_copied_to_the_same_grid() -> None:
    small = TransGANConfig(z_dim=8, w_dim=8, base=(8, 8), widths=(16, 16), layers=(1, 1))
    source, target = pair(small, dataclasses.replace(small, base=(4, 4), widths=(16, 16, 16), layers=(1, 1, 1)))
    copied = copy_weights(source, target, "G")
    for i in range(2):
        for key, x in source.synthesis.stages[i].state_dict().items():
            assert torch.equal(x, target.synthesis.stages[i + 1].state_dict()[key]), key
    assert {name.split(".")[2] for name in copied.new if "stages" in name} == {"4x4"}


def test_a_snapshot_of_another_kind_of_style_names_its_family() -> None:
    source, target = pair(G32, R3GANConfig(widths=(16, 16), layers=(1, 1), group_width=8).fit(8, 8))
    with pytest.raises(UserError, match="its generator is a StyleformerGenerator, so give the --cfg and --gen"):
        copy_weights(source, target, "G")


@pytest.mark.parametrize("c_dim", [0, 3])
def test_label_embeddings_within_styles_need_equal_conditioning(c_dim: int) -> None:
    open_width = R3GANConfig(widths=(16, 16), layers=(1, 1), group_width=8)
    with_labels = dataclasses.replace(open_width, c_dim=3).fit(8, 8)
    configs = (with_labels, open_width.fit(8, 8)) if c_dim else (open_width.fit(8, 8), with_labels)
    with pytest.raises(UserError, match=f"include the label embedding, so give --cond={'true' if c_dim else 'false'}"):
        copy_weights(*pair(*configs), "G")


def test_a_larger_generator_starts_from_the_smaller_one() -> None:
    """Outputs are equal up to the last block of the old resolution if the widths are equal."""
    source, target = pair(G32, G64)
    copied = copy_weights(source, target, "G")
    assert {name.split(".")[2] for name in copied.new} == {"64x64"}
    torch.testing.assert_close(target.mapping.w_avg, source.mapping.w_avg)
    small = torch.randn(2, 5, 8)
    large = torch.cat([small, small[:, -1:]], dim=1)
    seen: list[Tensor] = []
    target.synthesis.stages[2].register_forward_hook(lambda module, args, out: seen.append(out[1]))
    target.synthesis(large, "none")
    torch.testing.assert_close(seen[0], source.synthesis(small, "none"))


def test_additional_image_channels_keep_the_old_ones() -> None:
    source, target = pair(D32, dataclasses.replace(D32, img_channels=4))
    copied = copy_weights(source, target, "D")
    assert copied.partial == ("fromrgb.32x32.weight",)
    assert copied.new == ()
    img = torch.randn(4, 3, 32, 32)
    alpha = torch.zeros(4, 1, 32, 32)
    torch.testing.assert_close(target(torch.cat([img, alpha], dim=1), None), source(img, None))

    G, wide = pair(G32, dataclasses.replace(G32, img_channels=4))
    copied = copy_weights(G, wide, "G")
    assert {name.rpartition("torgb.")[2] for name in copied.partial} == {"weight", "bias"}
    z = torch.randn(2, 8)
    torch.testing.assert_close(wide(z, None)[:, :3], G(z, None))


def test_additional_classes_keep_the_old_ones() -> None:
    few, many = (dataclasses.replace(G32, c_dim=c_dim) for c_dim in (3, 5))
    G, more = pair(few, many)
    assert copy_weights(G, more, "G").partial == ("mapping.embed.weight",)
    z = torch.randn(3, 8)
    torch.testing.assert_close(more(z, torch.eye(5)[:3]), G(z, torch.eye(3)), rtol=1e-4, atol=1e-4)
    D, wide_d = (build(dataclasses.replace(D32, c_dim=c_dim), i) for i, c_dim in enumerate((3, 5)))
    assert copy_weights(D, wide_d, "D").partial == ("mapping.embed.weight",)
    img = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(wide_d(img, torch.eye(5)[:3]), D(img, torch.eye(3)), rtol=1e-4, atol=1e-4)


def test_an_unconditional_network_can_become_conditional() -> None:
    """With zero label weights, the mapping network equals the unconditional network."""
    G, conditional = pair(G32, dataclasses.replace(G32, c_dim=3))
    copied = copy_weights(G, conditional, "G")
    assert copied.partial == ("mapping.layers.0.weight",)
    assert set(copied.new) == {"mapping.embed.weight", "mapping.embed.bias"}
    with torch.no_grad():
        conditional.mapping.layers[0].weight[:, 8:] = 0
    z = torch.randn(3, 8)
    torch.testing.assert_close(conditional(z, torch.eye(3)), G(z, None), rtol=1e-4, atol=1e-4)


def test_encoder_blocks_are_copied_into_a_styleformer_c() -> None:
    mixed = StyleformerCConfig(
        z_dim=8, w_dim=8, widths=(24, 16, 8), layers=(1, 2, 1), resolutions=4, channel_base=64 * 8
    )
    source, target = pair(G32, mixed)
    copied = copy_weights(source, target, "G")
    assert {name.split(".")[1] for name in copied.new} == {"conv_stages"}
    assert torch.equal(target.synthesis.const, source.synthesis.const)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (G32, dataclasses.replace(G32, widths=(32, 24, 16))),
        (G32, dataclasses.replace(G32, base=(12, 12))),
        (G32, StyleGAN2Config(z_dim=8, w_dim=8, channel_base=256, channel_max=16)),
        (D32, dataclasses.replace(D32, channel_base=128, channel_max=8)),
    ],
)
def test_other_configurations_are_refused_and_change_nothing(source: Any, target: Any) -> None:
    old, new = pair(source, target)
    before = {key: x.clone() for key, x in new.state_dict().items()}
    with pytest.raises(UserError, match=r"N: only \d+% of the parameters are in the snapshot; it was"):
        copy_weights(old, new, "N")
    assert all(torch.equal(x, before[key]) for key, x in new.state_dict().items())


def test_styles_of_another_size_are_refused() -> None:
    source, target = pair(G32, dataclasses.replace(G32, w_dim=16))
    with pytest.raises(UserError, match=r"styles of 8 numbers, this network has styles of 16: give --set"):
        copy_weights(source, target, "G")


def test_freezing_layers_that_were_not_copied_is_refused() -> None:
    source, target = pair(D32, D64)
    copied = copy_weights(source, target, "D")
    check_frozen(target, 0, copied)
    with pytest.raises(UserError, match=r"--freezed=1: would freeze fromrgb\.64x64\.weight, fromrgb\.64x64\.bias at"):
        check_frozen(target, 1, copied)
    source, target = pair(D32, D32)
    copied = copy_weights(source, target, "D")
    assert copied.share == 1
    check_frozen(target, len(target.layers_from_image()), copied)


def test_fit_finds_the_part_that_can_be_copied() -> None:
    def part(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[slice, ...] | None:
        return fit(torch.zeros(old), torch.zeros(new), {(3, 4), (5, 10)})

    assert part((2, 3), (2, 3)) == (slice(2), slice(3))
    assert part((2, 3), (2, 4)) == (slice(2), slice(3))
    assert part((5, 2), (10, 2)) == (slice(5), slice(2))
    assert part((2, 4), (2, 3)) is None
    assert part((3, 5), (4, 10)) is None
    assert part((2,), (2, 1)) is None


def test_the_origin_survives_json() -> None:
    origin = Origin(source="a.pkl", kimg=1.5, copied_g=0.5, partial=("G: x",), new=("D: y", "D: z"))
    assert from_json(Origin, json.loads(json.dumps(to_json(origin)))) == origin
    with pytest.raises(ConfigError, match=r"must lie in 0\.\.1$"):
        Origin(copied_g=1.5)
