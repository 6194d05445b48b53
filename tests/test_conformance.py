"""Conformance suite for every generator and discriminator family in the tables of training/networks.

Every entry of GENERATORS and DISCRIMINATORS is tested, and so is the family of docs/adding_a_model.md.
Sizes, variants and expected parameter counts are in small_families.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_layers import build
from small_families import (
    D_DOUBLED,
    D_PARAMETERS,
    D_VARIANTS,
    DOCUMENTED_FAMILY,
    G_DOUBLED,
    G_PARAMETERS,
    G_VARIANTS,
    Settings,
    add_documented_family,
    small_discriminator,
    small_generator,
    small_train_config,
)
from torch import Tensor, nn
from training_helpers import new_trainer, saved_state, train_steps, train_with_a_break

from dnnlib.config import UserError, from_json, to_json
from exploration.attention_maps import attention_maps, has_attention, record
from exploration.model import Model
from torch_utils.checkpoint import digest
from training.augment.pipe import AugmentConfig, AugmentPipe
from training.config import PRESETS, TrainConfig
from training.loss import GAN, path_length
from training.networks import DISCRIMINATORS, GENERATORS, execution
from training.networks.weights import WeightCache
from training.snapshots.snapshot import load_network, save_network
from training.snapshots.transfer import copy_weights, places


@dataclass(frozen=True)
class Case:
    """Family of a table, or a variant of a family."""

    part: str  # "G" or "D"
    family: str
    variant: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.part, self.family, self.variant)))

    def config(self, side: int = 16, **changes: Any) -> Any:
        table, small = (G_VARIANTS, small_generator) if self.part == "G" else (D_VARIANTS, small_discriminator)
        settings = table[self.family][self.variant] if self.variant else {}
        return small(self.family, side, **{**settings, **changes})

    def inputs(self, config: Any, batch: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None]:
        """Return latents or images, and labels of all classes."""
        torch.manual_seed(1)
        shape = (config.z_dim,) if self.part == "G" else (config.img_channels, *config.img_size)
        x = torch.randn(batch, *shape, dtype=dtype)
        return x, torch.eye(config.c_dim, dtype=dtype).repeat(batch, 1)[:batch] if config.c_dim else None


G_CASES = [Case("G", family) for family in [*GENERATORS, DOCUMENTED_FAMILY]]
D_CASES = [Case("D", family) for family in DISCRIMINATORS]
FAMILIES = [*G_CASES, *D_CASES]
VARIANTS = [Case("G", family, name) for family, variants in G_VARIANTS.items() for name in variants]
VARIANTS += [Case("D", family, name) for family, variants in D_VARIANTS.items() for name in variants]
EVERY_G, EVERY_D = ([case for case in [*FAMILIES, *VARIANTS] if case.part == part] for part in "GD")

each_case = pytest.mark.parametrize("case", [*FAMILIES, *VARIANTS], ids=str)
each_family = pytest.mark.parametrize("case", FAMILIES, ids=str)
each_generator = pytest.mark.parametrize("case", EVERY_G, ids=str)
each_discriminator = pytest.mark.parametrize("case", EVERY_D, ids=str)


@pytest.fixture(autouse=True, scope="module")
def _documented_family() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        add_documented_family(patch)
        yield


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# Images and logits.


@each_generator
@pytest.mark.parametrize("c_dim", [0, 3])
def test_images_have_the_documented_shape_type_and_range(case: Case, c_dim: int) -> None:
    config = case.config(c_dim=c_dim, img_channels=1 + c_dim)
    torch.manual_seed(0)
    G = config.build()
    z, c = case.inputs(config, dtype=torch.float32)
    img = G(z, c)
    assert img.shape == (4, *G.img_shape) == (4, 1 + c_dim, 16, 16)
    assert (img.dtype, G.z_dim, G.w_dim, G.c_dim) == (torch.float32, 8, config.w_dim, c_dim)
    assert G.mapping(z, c).shape == (4, G.num_ws, G.w_dim)
    assert 0.01 < img.std() < 10
    if not c_dim:
        assert torch.equal(G(z, z.new_zeros(4, 0)), img)


@each_discriminator
@pytest.mark.parametrize("c_dim", [0, 3])
def test_logits_have_the_documented_shape_and_type(case: Case, c_dim: int) -> None:
    config = case.config(c_dim=c_dim, img_channels=1 + c_dim)
    D = config.build()
    img, c = case.inputs(config, dtype=torch.float32)
    logits = D(img, c)
    assert (logits.shape, logits.dtype) == ((4, 1), torch.float32)
    assert (D.img_shape, D.c_dim) == ((1 + c_dim, 16, 16), c_dim)
    assert logits.isfinite().all()
    if c is not None:
        assert not torch.allclose(D(img, c.roll(1, dims=0)), logits)


@each_discriminator
def test_concatenated_minibatches_do_not_affect_each_other(case: Case) -> None:
    """Generated and real images pass through D in one call."""
    config = case.config(c_dim=3)
    D = build(config)
    img, c = case.inputs(config, batch=8)
    assert c is not None
    with execution.using(minibatches=2):
        together = D(img, c)
    apart = torch.cat([D(x, y) for x, y in zip(img.split(4), c.split(4), strict=True)])
    same(together, apart)
    gradients = (torch.autograd.grad(x.sin().sum(), [*D.parameters()]) for x in (together, apart))
    for one, other in zip(*gradients, strict=True):
        same(one, other)


@each_generator
def test_an_image_does_not_depend_on_its_batch(case: Case) -> None:
    config = case.config(c_dim=3)
    G = build(config)
    z, c = case.inputs(config)
    assert c is not None
    images = G(z, c)
    same(torch.cat([G(z[i : i + 1], c[i : i + 1]) for i in range(4)]), images)
    assert (images[0] - images[1]).abs().max() > 1e-3


@each_discriminator
def test_logits_depend_only_on_the_minibatch_std_group(case: Case) -> None:
    """The order of the images in a group does not matter; without groups each image is independent."""
    alone = {field.name: 0 for field in fields(case.config()) if field.name == "mbstd_group_size"}
    for changes in (alone, {}):
        config = case.config(c_dim=3, **changes)
        D = build(config)
        img, c = case.inputs(config, batch=config.group_size or 4)
        assert c is not None
        logits = D(img, c)
        if not config.group_size:
            same(torch.cat([D(img[i : i + 1], c[i : i + 1]) for i in range(4)]), logits)
        same(D(img.flip(0), c.flip(0)), logits.flip(0))
    assert bool(alone) == bool(case.config().group_size)


@each_generator
def test_truncation_moves_styles_towards_w_avg(case: Case) -> None:
    config = case.config(c_dim=3)
    G = build(config)
    z, c = case.inputs(config)
    ws, w_avg = G.mapping(z, c), G.mapping.w_avg.clone()
    for cutoff in (None, 1):
        expected = ws.clone()
        expected[:, :cutoff] = w_avg + 0.7 * (ws[:, :cutoff] - w_avg)
        same(G.mapping(z, c, 0.7, cutoff), expected)
        same(G(z, c, truncation_psi=0.7, truncation_cutoff=cutoff), G.synthesis(expected))
    same(G(z, c, truncation_psi=0), G.synthesis(w_avg.expand(1, G.num_ws, -1)).expand(4, -1, -1, -1))
    assert torch.equal(G.mapping.w_avg, w_avg)


@each_generator
def test_noise_is_constant_absent_or_drawn_from_the_seed(case: Case) -> None:
    config = case.config()
    G = build(config)
    z, c = case.inputs(config)
    for mode in ("const", "none"):
        assert torch.equal(G(z, c, noise_mode=mode), G(z, c, noise_mode=mode))
    draws = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        draws.append(G(z, c, noise_mode="random"))
    has_noise = any(name.endswith("noise_const") for name in G.state_dict())
    assert torch.equal(draws[0], draws[1])
    assert torch.allclose(draws[0], draws[2]) != has_noise
    assert torch.allclose(G(z, c), G(z, c, noise_mode="none")) != has_noise


@each_discriminator
def test_discriminators_draw_noise_only_in_training(case: Case) -> None:
    config = case.config()
    D = build(config)
    img, c = case.inputs(config)
    before = torch.random.get_rng_state()
    logits = D(img, c)
    assert torch.equal(D(img, c), logits)
    assert torch.equal(torch.random.get_rng_state(), before)
    has_noise = any(name.endswith("noise_const") for name in D.state_dict())
    draws = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        with execution.using(random_noise=True):
            draws.append(D(img, c))
    assert torch.equal(draws[0], draws[1])
    assert torch.allclose(draws[0], draws[2]) == torch.allclose(draws[0], logits) != has_noise


@each_case
def test_equal_seeds_build_equal_networks(case: Case) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(case.config(c_dim=2).build().state_dict())
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    assert not all(torch.equal(x, states[2][name]) for name, x in states[0].items())


@each_case
def test_channels_last_changes_nothing(case: Case) -> None:
    config = case.config(c_dim=3)
    network = build(config)
    x, c = case.inputs(config)
    expected = network(x, c)
    network.to(memory_format=torch.channels_last)
    same(network(x.contiguous(memory_format=torch.channels_last) if case.part == "D" else x, c), expected)


@each_family
def test_inputs_of_another_shape_are_refused(case: Case) -> None:
    config = case.config(c_dim=3)
    network = config.build()
    x, c = case.inputs(config, dtype=torch.float32)
    name = "z has" if case.part == "G" else "images have"
    with pytest.raises(ValueError, match=rf"{name} shape \(4, .*this network needs \(batch, "):
        network(x[..., 1:], c)
    for labels in (None, torch.zeros(4, 2)):
        with pytest.raises(ValueError, match=r"labels have shape \(4, .*\(4, 3\)"):
            network(x, labels)
    with pytest.raises(ValueError, match=r"labels have shape \(4, 3\).*\(4, 0\)"):
        case.config().build()(x, c)
    if case.part == "G":
        with pytest.raises(ValueError, match=rf"ws has shape \(1, 99, .*\(batch, {network.num_ws}, {config.w_dim}\)"):
            network.synthesis(torch.zeros(1, 99, config.w_dim))
        with pytest.raises(ValueError, match="noise_mode='fixed'"):
            network(x, c, noise_mode="fixed")


# Derivatives.


@each_case
def test_a_gradient_reaches_every_parameter_and_input(case: Case) -> None:
    config = case.config(c_dim=3)
    network = build(config)
    x, c = case.inputs(config)
    x.requires_grad_()
    out = network(x, c)
    (out * torch.randn_like(out)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()} | {"input": x.grad}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []
    if case.part == "G":
        ws = torch.randn(2, network.num_ws, network.w_dim, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(network.synthesis(ws).square().sum(), ws)
        assert gradient.abs().sum(dim=2).all()  # every style is read


@each_case
def test_gradients_of_a_penalty_equal_finite_differences(case: Case) -> None:
    """Differentiate a squared gradient, path length for G and R1 for D, with respect to the parameters."""
    config = case.config(c_dim=3)
    network = build(config)
    if case.part == "G":
        function: Callable[..., Tensor] = network.synthesis
        inputs: tuple[Any, ...] = (torch.randn(2, network.num_ws, network.w_dim, dtype=torch.float64),)
    else:
        function, inputs = network, case.inputs(config)
    inputs[0].requires_grad_()
    with torch.no_grad():
        projection = torch.randn_like(function(*inputs))

    def penalty() -> Tensor:
        with execution.using(twice_differentiable=True):
            (gradient,) = torch.autograd.grad((function(*inputs) * projection).sum(), inputs[0], create_graph=True)
        return gradient.square().sum()

    assert_equals_finite_differences(penalty, list(network.parameters()))


def assert_equals_finite_differences(function: Callable[[], Tensor], parameters: list[nn.Parameter]) -> None:
    """Compare the autograd derivative with a numerical derivative along a random direction.

    A smaller step is tried if they differ, because a step may cross the kink of a leaky ReLU.
    """
    directions = [torch.randn_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def move(step: float) -> None:
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.add_(direction, alpha=step)

    gradients = torch.autograd.grad(function(), parameters, allow_unused=True)
    slope = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True) if g is not None)
    differences = []
    for step in (1e-6, 1e-7, 1e-8):
        move(step)
        after = function().item()
        move(-2 * step)
        differences.append((after - function().item()) / (2 * step))
        move(step)
        if slope == pytest.approx(differences[-1], rel=1e-4) and slope != 0:
            return
    pytest.fail(f"derivative {slope}, differences {differences}")


@each_generator
def test_path_length_uses_the_gradient_of_each_style(case: Case) -> None:
    """Without style mixing the mapping network returns one expanded w; each style still has its own gradient."""
    G = build(case.config(c_dim=0))
    if G.num_ws == 1:
        return
    zero, labels = torch.zeros([], dtype=torch.float64), torch.zeros(1, 0)
    pipe = AugmentPipe(AugmentConfig(mode="noaug"), G.img_shape)
    gan: Any = GAN(G=G, D=None, augment=pipe, labels=labels, style_mixing=0.0, pl_mean=zero)
    gan.sample_latents = lambda count: (torch.randn(count, G.z_dim).double(), torch.zeros(count, 0))
    torch.manual_seed(4)
    with execution.using(shared_styles=True):  # as in training
        terms = path_length(gan, torch.zeros(4, 3, 16, 16), torch.zeros(4, 0), weight=1.0, decay=0.5)
    torch.manual_seed(4)
    ws = G.mapping(torch.randn(2, G.z_dim).double(), None).clone(memory_format=torch.contiguous_format)
    img = G.synthesis(ws, noise_mode="random")
    y = torch.randn_like(img) / 16
    (gradient,) = torch.autograd.grad((img * y).sum(), ws)
    lengths = torch.stack([(image**2).sum() / G.num_ws for image in gradient]).sqrt()
    same(terms.stats["Loss/path_length"].detach(), lengths)


# Execution modes.


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reduced_precision_is_close(case: Case, dtype: torch.dtype) -> None:
    config = case.config()
    torch.manual_seed(0)
    network = config.build()
    x, c = case.inputs(config, dtype=torch.float32)
    with torch.no_grad():
        exact = network(x, c)
        with execution.using(reduced=dtype):
            reduced = network(x, c)
    assert reduced.dtype == torch.float32
    assert 0 < (reduced - exact).norm() < 0.05 * exact.norm()


@each_case
def test_recomputing_activations_changes_nothing(case: Case) -> None:
    config = case.config(c_dim=3)
    network = build(config)
    x, c = case.inputs(config)
    options = {"noise_mode": "random"} if case.part == "G" else {}
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(3)
        with execution.using(recompute=recompute, random_noise=True):
            out = network(x, c, **options).square().sum()
        gradients.append(torch.autograd.grad(out, list(network.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@each_case
def test_cached_weights_change_nothing(case: Case) -> None:
    """The first pass of a phase fills the cache weight by weight, later ones fill it at once."""
    config = case.config(c_dim=3)
    network = build(config).float()
    x, c = case.inputs(config, dtype=torch.float32)
    cache = WeightCache()
    results = []
    for weights in (None, cache, cache):
        with execution.using(weights=weights, reduced=torch.bfloat16), cache.filled():
            out = network(x, c)
            results.append([out, *torch.autograd.grad(out.square().sum(), [*network.parameters()])])
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            # Gradients of a weight that is used twice are added in bfloat16, whose rounding error is 2^-9.
            assert (actual - expected).norm() <= 2**-8 * expected.norm()
    assert cache.requests


# Interfaces for tools: styles, attention maps, Freeze-D, configurations, snapshots, training, transfer.


@each_generator
def test_style_groups_contain_each_style_once(case: Case) -> None:
    config = case.config()
    with torch.device("meta"):
        G = config.build()
    grids, groups = config.style_grids, G.style_groups
    assert len(grids) in (0, G.num_ws)
    thirds = [style for name in ("coarse", "middle", "fine") for style in groups.get(name, ())]
    assert sorted(thirds) == list(range(len(grids)))
    assert [grids[style] for style in thirds] == sorted(grids)
    assert {style for group in groups.values() for style in group} == set(thirds)
    assert G.synthesis.block_resolutions[-1] == max(config.img_size)


@each_generator
def test_attention_maps_are_the_weights_of_the_values(case: Case) -> None:
    config = case.config()
    G = build(config).requires_grad_(False)
    model = Model(G=G, device=torch.device("cpu"), c=torch.zeros(1, 0))
    ws = torch.randn(1, G.num_ws, G.w_dim, dtype=torch.float64)
    if not has_attention(G.synthesis):
        with pytest.raises(UserError, match="has no self-attention"):
            record(model, ws)
        return
    records, img = record(model, ws)
    same(img, G.synthesis(ws))
    G.float()  # the records are in float32
    for block in records:
        v = torch.randn_like(block.q)
        maps = block.maps(0, torch.arange(block.q.shape[1]))  # (heads, N, N)
        expected = maps @ v[0].unflatten(1, (len(maps), -1)).transpose(0, 1)
        torch.testing.assert_close(block.module(block.q, block.k, v)[0], expected.transpose(0, 1).flatten(1))
    found = attention_maps(records, 0, torch.tensor([[3, 5], [15, 0]]), config.img_size)
    has_margin = any(hasattr(block.module, "band") for block in records)  # which is not part of the maps
    for rolled in found.rolled.values():
        sums = rolled.reshape(2, -1).sum(axis=1)
        assert (sums > 0).all() and (sums < 1).all() if has_margin else sums == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("case", D_CASES, ids=str)
def test_freeze_d_counts_layers_from_the_image(case: Case) -> None:
    D = build(case.config())
    layers = D.layers_from_image()
    assert set(layers) < set(D.modules())
    frozen = [parameter for layer in layers for parameter in layer.parameters()]
    assert len({id(parameter) for parameter in frozen}) == len(frozen) < len(list(D.parameters()))
    assert any(layers[0] is module or layers[0] in module.modules() for module in D.children())
    (gradient,) = torch.autograd.grad(
        D(torch.randn(4, *D.img_shape).double(), None).sum(), list(layers[-1].parameters())[:1]
    )
    assert gradient.any()


@each_family
def test_the_number_of_parameters_does_not_change(case: Case) -> None:
    """The number is checked for the families in the tables of small_families.py; every family is built."""
    config: Any = (GENERATORS if case.part == "G" else DISCRIMINATORS)[case.family]()
    with torch.device("meta"):
        network = config.build()
    assert network.img_shape == (3, *config.img_size)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == (G_PARAMETERS if case.part == "G" else D_PARAMETERS).get(case.family, count)


@each_case
def test_a_configuration_round_trips_through_json(case: Case) -> None:
    part = "generator" if case.part == "G" else "discriminator"
    config = replace(PRESETS["tiny"], **{part: case.config(c_dim=3)})
    data = json.loads(json.dumps(to_json(config)))
    assert data[part]["family"] == case.family
    assert from_json(TrainConfig, data) == config


def train_config(case: Case, data: Path, **changes: Any) -> TrainConfig:
    G, D = (case.family, "stylegan2") if case.part == "G" else ("styleformer", case.family)
    return small_train_config(data, G, D, augment__mode="noaug", run__batch_gpu=4, **changes)


@each_family
def test_a_snapshot_restores_the_same_networks(case: Case, shapes_zip: Path, tmp_path: Path) -> None:
    config = train_config(case, shapes_zip, data__use_labels=True)
    networks = {name: getattr(config, part).build() for name, part in
                (("G", "generator"), ("D", "discriminator"), ("G_ema", "generator"))}  # fmt: skip
    save_network(tmp_path / "n.pkl", config=config, **networks, nimg=12_345, ada_p=0.1 + 0.2)
    loaded = load_network(tmp_path / "n.pkl")
    assert (loaded.config, loaded.nimg, loaded.ada_p) == (config, 12_345, 0.1 + 0.2)
    for name, network in networks.items():
        state = getattr(loaded, name).state_dict()
        assert list(state) == list(network.state_dict())
        assert all(torch.equal(x, state[key]) for key, x in network.state_dict().items())


@each_family
def test_a_resumed_run_continues_bit_for_bit(case: Case, shapes_zip: Path, tmp_path: Path) -> None:
    config = train_config(case, shapes_zip)
    straight = new_trainer(config)
    network = straight.G if case.part == "G" else straight.D
    before = {name: x.clone() for name, x in network.named_parameters()}
    train_steps(straight, 2)
    assert [name for name, x in network.named_parameters() if torch.equal(x, before[name])] == []
    resumed = train_with_a_break(config, 1, 1, tmp_path)
    assert digest(saved_state(resumed)) == digest(saved_state(straight))


@each_family
@pytest.mark.parametrize("is_up", [True, False], ids=["up", "down"])
def test_weights_transfer_to_another_resolution(case: Case, is_up: bool) -> None:
    doubled: Settings = (G_DOUBLED if case.part == "G" else D_DOUBLED).get(case.family, {})
    configs = [case.config(), case.config(32, **doubled)]
    source, target = (build(config) for config in (configs if is_up else configs[::-1]))
    copied = copy_weights(source, target, case.part)
    assert copied.share > 0.25
    there = {place: source.state_dict()[name] for name, place in places(source).items()}
    new = []
    for name, place in places(target).items():
        if place in there and there[place].shape == target.state_dict()[name].shape:
            assert torch.equal(target.state_dict()[name], there[place]), place
        else:
            new.append(place)
    assert set(new) == {*copied.new, *copied.partial}


@each_family
def test_all_weights_transfer_to_an_equal_network(case: Case) -> None:
    source, target = build(case.config()), case.config().build().double()
    copied = copy_weights(source, target, case.part)
    assert (copied.share, copied.new, copied.partial) == (1, (), ())
    assert all(torch.equal(x, target.state_dict()[name]) for name, x in source.state_dict().items())
