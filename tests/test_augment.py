"""ADA: identity at p = 0, every transform against its closed form, gates, gradients, and the controller."""

from collections.abc import Callable
from math import ceil, cos, pi, sin, sqrt
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from torch import Tensor

from dnnlib.config import ConfigError
from dnnlib.schedule import Schedule
from torch_utils.graphs import no_synchronisation
from training.augment import stages
from training.augment.pipe import AdaController, AugmentConfig, AugmentPipe
from training.augment.stages import (
    COLOR,
    GEOMETRY,
    PIPES,
    SYM6,
    AffineStage,
    CutoutStage,
    FilterStage,
    MatrixTransform,
    NoiseStage,
    RandomMatrices,
    RandomMatrix,
    Warp,
    filter_bank,
    recolor,
    uniform,
)

LUMA = np.array([1.0, 1.0, 1.0, 0.0]) / sqrt(3)


NEVER = torch.tensor(False)  # no step is skipped


def build(pipe: str, img_shape: tuple[int, int, int], p: float) -> AugmentPipe:
    return AugmentPipe(AugmentConfig(mode="fixed", pipe=pipe, p=p), img_shape)


def ada(**changes: Any) -> AdaController:
    config = AugmentConfig(pipe="color", **changes)
    return AdaController(config, AugmentPipe(config, (3, 8, 8)))


# ---------------------------------------------------------------------------------------------- the pipeline


@pytest.mark.parametrize("pipe", PIPES)
@pytest.mark.parametrize("img_shape", [(3, 32, 32), (1, 23, 40), (4, 27, 22)])
def test_images_do_not_change_at_p_zero(pipe: str, img_shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, *img_shape)
    torch.testing.assert_close(build(pipe, img_shape, p=0.0)(images), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("img_shape", [(2, 16, 9), (5, 3, 4), (3, 7, 7), (3, 64, 3)])
def test_odd_image_shapes_do_not_change_at_p_zero(img_shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, *img_shape)
    torch.testing.assert_close(build("bg", img_shape, p=0.0)(images), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("img_shape", [(3, 32, 32), (1, 24, 40)])
def test_every_transform_fires_at_p_one(img_shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, *img_shape)
    augmented = build("bgcfnc", img_shape, p=1.0)(images)
    assert augmented.shape == images.shape
    assert augmented.isfinite().all()
    assert (augmented - images).abs().mean(dim=(1, 2, 3)).min() > 0.1


def test_the_number_of_draws_does_not_depend_on_p() -> None:
    states = []
    for p in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        build("bgcfnc", (3, 24, 24), p)(torch.zeros(2, 3, 24, 24))
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_no_value_is_read_by_the_host() -> None:
    config = AugmentConfig(pipe="bgcfnc")
    pipe = AugmentPipe(config, (3, 24, 32)).to("meta")  # reading a value of a meta tensor raises an error
    assert pipe(torch.empty(2, 3, 24, 32, device="meta")).shape == (2, 3, 24, 32)
    controller = AdaController(config, pipe)
    controller.observe(torch.empty([], device="meta"), NEVER.to("meta"))
    controller.update(4, 32)


def test_only_the_groups_of_the_pipe_are_built() -> None:
    def stages(pipe: str) -> list[type]:
        return [type(stage) for stage in build(pipe, (3, 32, 32), p=1.0).stages]

    assert stages("noise") == [NoiseStage]
    assert stages("bgcfnc") == [AffineStage, FilterStage, NoiseStage, CutoutStage]
    blit, color, both = (AffineStage(pipe, (3, 32, 32)) for pipe in ("blit", "color", "bgc"))
    assert [t.name for t in blit.geometry] == ["xflip", "rotate90", "xint"]
    assert [t.name for t in both.geometry] == [*GEOMETRY_BY_HAND]
    assert [t.name for t in both.color] == [t.name for t in color.color] == COLOR_NAMES
    assert (blit.color, color.geometry, color.warp) == ([], [], None)
    assert (blit.is_deterministic, color.is_deterministic, both.is_deterministic) == (False, True, False)


def test_a_pipe_is_named_after_its_groups() -> None:
    groups = ["blit", "geom", "color", "filter", "noise", "cutout"]  # Karras et al. 2020b
    for pipe in ("bg", "bgc", "bgcf", "bgcfn", "bgcfnc", "bgcc"):
        if pipe != "bgcc":
            assert list(PIPES[pipe]) == groups[: len(pipe)]
        assert pipe == "".join(group[0] for group in PIPES[pipe])
    assert {pipe: PIPES[pipe] for pipe in groups} == {group: (group,) for group in groups}
    assert [t.name for t in GEOMETRY if t.group in groups] == [*GEOMETRY_BY_HAND]
    assert [t.name for t in COLOR if t.group in groups] == COLOR_NAMES


def test_a_transform_in_a_new_group_changes_no_other_pipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A new row at any position of the table changes neither the draws nor the output of `bgc`."""

    def invert(size: tuple[int, int]) -> RandomMatrix:
        return RandomMatrix(uniform(pi, pi), {"cos": np.diag([1.0, 1, 1, 0])})

    images = torch.rand(4, 3, 16, 16) * 2 - 1
    torch.manual_seed(0)
    before = build("bgc", (3, 16, 16), p=0.5)(images)
    monkeypatch.setattr(stages, "COLOR", (MatrixTransform("invert", "negative", invert), *COLOR))
    monkeypatch.setattr(AffineStage, "groups", (*AffineStage.groups, "negative"))
    monkeypatch.setitem(PIPES, "bgc-negative", (*PIPES["bgc"], "negative"))
    monkeypatch.setitem(PIPES, "negative", ("negative",))
    torch.manual_seed(0)
    torch.testing.assert_close(build("bgc", (3, 16, 16), p=0.5)(images), before, rtol=0, atol=0)
    torch.testing.assert_close(AffineStage("negative", (3, 16, 16))(images, torch.ones([])), -images)
    assert len(AffineStage("bgc-negative", (3, 16, 16)).color) == len(COLOR_NAMES) + 1


@pytest.mark.parametrize("mode", ["noaug", "apa"])
def test_without_transforms_nothing_is_built_or_refused(mode: Any) -> None:
    pipe = AugmentPipe(AugmentConfig(mode=mode, pipe="bgcfnc"), (2, 8, 8))
    assert len(pipe.stages) == 0
    images = torch.randn(2, 2, 8, 8)
    assert torch.equal(pipe(images), images)


@pytest.mark.parametrize("pipe", ["bgc", "noise", "cutout"])
def test_second_derivatives_are_correct(pipe: str) -> None:
    module = build(pipe, (3, 5, 6), p=1.0)

    def seeded(images: Tensor) -> Tensor:
        torch.manual_seed(1)
        return module(images).square()

    images = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(seeded, images, fast_mode=True)
    assert torch.autograd.gradgradcheck(seeded, images, fast_mode=True)


@pytest.mark.parametrize("dense_side", [0, 256], ids=["convolutions", "matrices"])
def test_second_derivatives_of_the_filter_are_correct(dense_side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "DENSE_SIDE", dense_side)
    module = build("filter", (1, 22, 23), p=1.0)

    def seeded(images: Tensor) -> Tensor:
        torch.manual_seed(1)
        return module(images).square()

    images = torch.randn(2, 1, 22, 23, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(seeded, images, fast_mode=True)
    assert torch.autograd.gradgradcheck(seeded, images, fast_mode=True)


@pytest.mark.gpu
def test_cuda_equals_cpu_without_synchronisation() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 48)
    cpu = build("bgcfnc", (3, 32, 48), p=0.7)
    cuda = build("bgcfnc", (3, 32, 48), p=0.7).cuda()
    on_device = images.cuda()
    cuda(on_device)  # lazy initialisation of libraries may synchronise
    with no_synchronisation():
        cuda(on_device)
    for stage_cpu, stage_cuda in zip(cpu.stages, cuda.stages, strict=True):
        values = stage_cpu.draw(images, cpu.p)  # type: ignore[operator]
        expected = stage_cpu.transform(images, values)  # type: ignore[operator]
        actual = stage_cuda.transform(on_device, values.cuda()).cpu()  # type: ignore[operator]
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_cuda_second_derivative_equals_cpu() -> None:
    gradients = []
    for device in ("cpu", "cuda"):
        warp = Warp((16, 16)).to(device)
        torch.manual_seed(0)
        images = torch.randn(2, 3, 16, 16, dtype=torch.float64).to(device).requires_grad_()
        A = torch.from_numpy(in_space(affine(0.8, 0.3, -0.2, 1.1, 1.7, -0.4))).to(device)
        output = warp(images, A.expand(2, 4, 4)).pow(3).sum()
        (first,) = torch.autograd.grad(output, images, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), images)
        gradients.append(second.cpu())
    torch.testing.assert_close(gradients[1], gradients[0])


# ---------------------------------------------------------------------------------------------- geometry


def affine(a: float, b: float, c: float, d: float, tx: float, ty: float) -> np.ndarray:
    return np.array([[a, b, tx], [c, d, ty], [0, 0, 1]], dtype=np.float64)


def in_space(A: np.ndarray) -> np.ndarray:
    """Extend a map of (x, y, 1) to (x, y, 0, 1)."""
    matrix = np.eye(4)
    matrix[np.ix_([0, 1, 3], [0, 1, 3])] = A
    return matrix


def turn(t: float) -> np.ndarray:
    return affine(cos(t), -sin(t), sin(t), cos(t), 0, 0)


# name -> inverse matrix from u, n, height and width; the image of the test is 40 wide and 24 high.
GEOMETRY_BY_HAND: dict[str, Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]] = {
    "xflip": lambda u, n, H, W: affine(-1 if u[0] >= 0.5 else 1, 0, 0, 1, 0, 0),
    "rotate90": lambda u, n, H, W: np.round(turn(int(4 * u[0]) * pi / 2)),
    "xint": lambda u, n, H, W: affine(1, 0, 0, 1, -np.rint((2 * u[0] - 1) / 8 * W), -np.rint((2 * u[1] - 1) / 8 * H)),
    "scale": lambda u, n, H, W: affine(1 / 2 ** (0.2 * n[0]), 0, 0, 1 / 2 ** (0.2 * n[0]), 0, 0),
    "rotate_pre": lambda u, n, H, W: turn(-pi + 2 * pi * u[0]),
    "aniso": lambda u, n, H, W: affine(1 / 2 ** (0.2 * n[0]), 0, 0, 2 ** (0.2 * n[0]), 0, 0),
    "rotate_post": lambda u, n, H, W: turn(-pi + 2 * pi * u[0]),
    "xfrac": lambda u, n, H, W: affine(1, 0, 0, 1, -0.125 * n[0] * W, -0.125 * n[1] * H),
}


COLOR_NAMES = ["brightness", "contrast", "lumaflip", "hue", "saturation"]


def row(transforms: tuple[MatrixTransform, ...], name: str) -> MatrixTransform:
    """Return the row of a table of transforms by name."""
    return next(transform for transform in transforms if transform.name == name)


def matrices(transform: MatrixTransform, u: Tensor, n: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the matrices [B, 4, 4] of an applied transform for draws u and n [2, B]."""
    gated = torch.cat([u, torch.zeros_like(u[:1])])
    return RandomMatrices([[transform]], size).matrices(gated[None], n[None], torch.ones([]))[0]


def color_by_hand(name: str, u: np.ndarray, n: np.ndarray) -> np.ndarray:
    eye, luma = np.eye(4), np.outer(LUMA, LUMA)
    if name == "brightness":
        return eye + 0.2 * n[0] * np.outer([1, 1, 1, 0], [0, 0, 0, 1])
    if name == "contrast":
        return np.diag([2 ** (0.5 * n[0])] * 3 + [1])
    if name == "lumaflip":
        return eye - 2 * (u[0] >= 0.5) * luma
    if name == "hue":  # Rodrigues' formula
        t = -pi + 2 * pi * u[0]
        x, y, z = LUMA[:3]
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        matrix = eye.copy()
        matrix[:3, :3] += sin(t) * cross + (1 - cos(t)) * cross @ cross
        return matrix
    assert name == "saturation"
    matrix = luma + 2 ** n[0] * (eye - luma)
    matrix[3, 3] = 1  # acts on colours only
    return matrix


@pytest.mark.parametrize("name", GEOMETRY_BY_HAND)
def test_geometric_transforms_have_their_matrices(name: str) -> None:
    transform = row(GEOMETRY, name)
    torch.manual_seed(0)
    u, n = torch.rand(2, 50, dtype=torch.float64), torch.randn(2, 50, dtype=torch.float64)
    expected = [in_space(GEOMETRY_BY_HAND[name](u[:, b].numpy(), n[:, b].numpy(), 24, 40)) for b in range(50)]
    np.testing.assert_allclose(matrices(transform, u, n, (24, 40)).numpy(), np.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", COLOR_NAMES)
def test_color_transforms_have_their_matrices(name: str) -> None:
    transform = row(COLOR, name)
    torch.manual_seed(0)
    u, n = torch.rand(2, 50, dtype=torch.float64), torch.randn(2, 50, dtype=torch.float64)
    expected = [color_by_hand(transform.name, u[:, b].numpy(), n[:, b].numpy()) for b in range(50)]
    np.testing.assert_allclose(matrices(transform, u, n, (8, 8)).numpy(), np.stack(expected), rtol=0, atol=1e-12)


def test_integer_shift_rounds_half_to_even() -> None:
    u = (torch.tensor([[0.5, 1.5, 2.5, -2.5]] * 2, dtype=torch.float64) / 4 + 1) / 2  # shifts are multiples of 32/8
    xint = row(GEOMETRY, "xint")
    assert (-matrices(xint, u, u, (32, 32))[:, 0, 3]).tolist() == [0, 2, 2, -2]


def test_inverses_and_colors_are_multiplied_in_their_order() -> None:
    """Repeat the draws of the stage: uniform [16, 3, B] and normal [16, 2, B], for coordinates and colours in turn."""
    stage = AffineStage("bgc", (3, 24, 40))
    torch.manual_seed(3)
    values = stage.draw(torch.zeros(6, 3, 24, 40, dtype=torch.float64), torch.tensor(0.6))
    torch.manual_seed(3)
    u = torch.rand(16, 3, 6, dtype=torch.float64).numpy()
    n = torch.randn(16, 2, 6, dtype=torch.float64).numpy()
    for b in range(6):
        A, K = np.eye(3), np.eye(4)
        for i, name in enumerate(GEOMETRY_BY_HAND):
            chance = 1 - sqrt(0.4) if name.startswith("rotate_") else 0.6
            if u[2 * i, 2, b] < chance:
                A = A @ GEOMETRY_BY_HAND[name](u[2 * i, :2, b], n[2 * i, :, b], 24, 40)
        for i, name in enumerate(reversed(COLOR_NAMES)):
            if u[2 * i + 1, 2, b] < 0.6:
                K = K @ color_by_hand(name, u[2 * i + 1, :2, b], n[2 * i + 1, :, b])
        np.testing.assert_allclose(values[b].numpy(), np.stack([in_space(A), K]), rtol=0, atol=1e-12)


def filter_up(x: np.ndarray, pad: int) -> np.ndarray:
    """u[n] = 2 sum_j f[j] z[n + 5 - j] along the last axis, after mirroring x by `pad` pixels on both sides."""
    x = np.pad(x, [(0, 0), (pad, pad)], mode="reflect")
    f = np.array(SYM6) / np.sum(SYM6)
    z = np.zeros([x.shape[0], 2 * x.shape[1] + 24])
    z[:, 12:-12:2] = x
    length = 2 * x.shape[1]
    return sum(2 * f[j] * z[:, 12 + 5 - j :][:, :length] for j in range(12))


def filter_down(x: np.ndarray) -> np.ndarray:
    """out[i] = sum_j f[j] x[2i + 1 + j] along the last axis."""
    f = np.array(SYM6) / np.sum(SYM6)
    size = x.shape[1] // 2 - 6
    return np.stack([x[:, 2 * i + 1 : 2 * i + 13] @ f for i in range(size)], axis=1)


def warp_by_hand(image: np.ndarray, A: np.ndarray) -> np.ndarray:
    """Warp image [H, W] by A in float64, with enough mirrored padding to cover every sample."""
    H, W = image.shape
    pad = 3 * (H + W)
    u = filter_up(filter_up(image, pad).T, pad).T
    half_w, half_h = W + 6, H + 6
    X, Y = np.meshgrid(np.arange(2 * half_w) - (2 * half_w - 1) / 2, np.arange(2 * half_h) - (2 * half_h - 1) / 2)
    q = np.einsum("ij,jyx->iyx", A, np.stack([(X + 0.5) / 2, (Y + 0.5) / 2, np.ones_like(X)]))
    column = 2 * q[0] - 0.5 + (u.shape[1] - 1) / 2
    row = 2 * q[1] - 0.5 + (u.shape[0] - 1) / 2
    assert column.min() > 12
    assert row.min() > 12
    assert column.max() < u.shape[1] - 12
    assert row.max() < u.shape[0] - 12
    sampled = scipy.ndimage.map_coordinates(u, [row, column], order=1)
    return filter_down(filter_down(sampled).T).T


WARPS = {
    "flip": affine(-1, 0, 0, 1, 0, 0),
    "quarter": turn(pi / 2),
    "rotate": turn(0.7),
    "enlarge": affine(0.6, 0, 0, 0.6, 0, 0),
    "shrink_beyond_one_reflection": affine(3.1, 0.4, -0.2, 2.9, 5.3, -7.1),
    "general": turn(0.4) @ affine(1.3, 0, 0, 0.8, 2.2, -3.7) @ turn(-1.9),
}


@pytest.mark.parametrize("size", [(16, 16), (13, 20)])
@pytest.mark.parametrize("dense_side", [0, 256], ids=["filters", "matrices"])
@pytest.mark.parametrize("name", WARPS)
def test_warp_equals_the_reference(
    name: str, size: tuple[int, int], dense_side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "DENSE_SIDE", dense_side)
    torch.manual_seed(0)
    images = torch.randn(2, 1, *size, dtype=torch.float64)
    warped = Warp(size)(images, torch.from_numpy(in_space(WARPS[name])).expand(2, 4, 4))
    expected = np.stack([warp_by_hand(image.numpy(), WARPS[name]) for image in images[:, 0]])
    np.testing.assert_allclose(warped[:, 0].numpy(), expected, rtol=0, atol=1e-11)


def test_warp_is_accurate_in_float32() -> None:
    """Random warps are accurate to 1e-4 in float32; white noise is the worst case."""
    torch.manual_seed(0)
    images = torch.randn(8, 1, 32, 32)
    stage = AffineStage("bg", (1, 32, 32))
    values = stage.draw(images, torch.tensor(1.0))
    maps = values[:, 0, [0, 1, 3]][:, :, [0, 1, 3]].double().numpy()  # of (x, y, 1)
    expected = [warp_by_hand(x.double().numpy(), A) for x, A in zip(images[:, 0], maps, strict=True)]
    np.testing.assert_allclose(stage.transform(images, values)[:, 0].numpy(), np.stack(expected), rtol=0, atol=1e-4)


def test_integer_shift_is_exact() -> None:
    torch.manual_seed(0)
    images = torch.randn(1, 2, 20, 17)
    A = torch.from_numpy(in_space(affine(1, 0, 0, 1, -3, 2))).float()  # 3 to the right, 2 up
    shifted = Warp((20, 17))(images, A[None])
    torch.testing.assert_close(shifted[:, :, :-2, 3:], images[:, :, 2:, :-3], rtol=0, atol=1e-5)
    torch.testing.assert_close(shifted[:, :, -1], shifted[:, :, -5], rtol=0, atol=1e-5)  # mirrored at the last row
    torch.testing.assert_close(shifted[:, :, :, 0], shifted[:, :, :, 6], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("transform", "expected"),
    [("xflip", lambda x: x.flip(-1)), ("rotate90", lambda x: x.rot90(1, (-2, -1)))],
    ids=["xflip", "rotate90"],
)
def test_flips_and_turns_have_the_correct_direction(transform: str, expected: Callable[[Tensor], Tensor]) -> None:
    """The filter is asymmetric, so the result is not exact. A maps output to input: Rot(pi/2) turns the image left."""
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.randn(1, 1, 5, 5), size=[40, 40], mode="bicubic")
    u = torch.full([2, 1], 0.6 if transform == "xflip" else 0.3)
    turned = Warp((40, 40))(smooth, matrices(row(GEOMETRY, transform), u, u, (40, 40)).float())
    target = expected(smooth)
    assert (turned - target)[..., 3:-3, 3:-3].std() < 0.1 * target.std()
    assert (smooth - target).std() > 0.5 * target.std()


# ---------------------------------------------------------------------------------------------- colour


def color_matrix(name: str, *, u: float = 0.0, n: float = 0.0) -> Tensor:
    return matrices(row(COLOR, name), torch.full([2, 1], u), torch.full([2, 1], n), (6, 7)).float()


def test_color_transforms_have_their_closed_forms() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 6, 7)
    luma = x.mean(dim=1, keepdim=True)
    torch.testing.assert_close(recolor(x, color_matrix("brightness", n=1.5)), x + 0.3)
    torch.testing.assert_close(recolor(x, color_matrix("contrast", n=2.0)), x * 2)
    torch.testing.assert_close(recolor(x, color_matrix("lumaflip", u=0.7)), x - 2 * luma)
    torch.testing.assert_close(recolor(x, color_matrix("lumaflip", u=0.3)), x)
    torch.testing.assert_close(recolor(x, color_matrix("hue", u=0.5 + 1 / 3)), x.roll(1, dims=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(recolor(x, color_matrix("hue", u=0.5)), x)
    torch.testing.assert_close(recolor(x, color_matrix("saturation", n=1.0)), luma + 2 * (x - luma))
    torch.testing.assert_close(recolor(x, color_matrix("saturation", n=-30.0)), luma.expand_as(x))


def test_color_transforms_keep_alpha() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 4, 8, 8)
    pipe = build("color", (4, 8, 8), p=1.0)
    torch.manual_seed(1)
    augmented = pipe(x)
    assert torch.equal(augmented[:, 3], x[:, 3])
    torch.manual_seed(1)
    torch.testing.assert_close(augmented[:, :3], build("color", (3, 8, 8), p=1.0)(x[:, :3]))


def test_gray_images_are_transformed_by_the_mean_row() -> None:
    stage = AffineStage("color", (1, 5, 6))
    assert [t.name for t in stage.color] == ["brightness", "contrast", "lumaflip"]
    x, K = torch.randn(2, 1, 5, 6), torch.randn(2, 4, 4)
    k = K[:, :3].mean(dim=1)
    for b in range(2):
        expected = x[b] * (k[b, 0] + k[b, 1] + k[b, 2]) + k[b, 3]
        torch.testing.assert_close(recolor(x, K)[b], expected)


# ---------------------------------------------------------------------------------------------- filter, noise, cutout


def test_the_filter_bank_separates_the_bands() -> None:
    bank = filter_bank().numpy()
    assert bank.shape == (4, 43)
    np.testing.assert_allclose(bank, bank[:, ::-1], atol=1e-12)
    np.testing.assert_allclose(bank[:, 21], [0.125, 0.125, 0.25, 0.5], atol=1e-12)
    np.testing.assert_allclose(bank.sum(axis=1), [1, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(bank.sum(axis=0), np.eye(43)[21], atol=1e-12)
    response = np.abs(np.fft.rfft(bank, 512))  # 256 is the Nyquist frequency
    assert (response[0, :16] > 0.9).all()
    assert (response[3, -60:] > 0.9).all()
    assert response.argmax(axis=1).tolist() == sorted(response.argmax(axis=1))


def test_filter_gains_equal_the_reference() -> None:
    stage = FilterStage("filter", (1, 22, 22))
    torch.manual_seed(0)
    t = torch.randn(5, 4, dtype=torch.float64).exp2()
    power = np.array([10, 1, 1, 1]) / 13
    for b in range(5):
        total = np.ones(4)
        for i in range(4):
            v = np.ones(4)
            v[i] = t[b, i].item()
            total *= v / sqrt((power * v**2).sum())
        np.testing.assert_allclose(stage.gains(t)[b].numpy(), total, rtol=1e-12)


@pytest.mark.parametrize("dense_side", [0, 256], ids=["convolutions", "matrices"])
def test_the_filter_equals_that_of_scipy(dense_side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "DENSE_SIDE", dense_side)
    torch.manual_seed(0)
    images = torch.randn(2, 3, 22, 30, dtype=torch.float64)
    gains = torch.tensor([[1.3, 0.2, 0.8, 2.0], [0.4, 1.0, 3.0, 0.1]], dtype=torch.float64)
    filtered = FilterStage("filter", (3, 22, 30)).transform(images, gains)
    bank = filter_bank().numpy()
    for b in range(2):
        taps = gains[b].numpy() @ bank
        expected = scipy.ndimage.convolve1d(images[b].numpy(), taps, axis=-1, mode="mirror")
        expected = scipy.ndimage.convolve1d(expected, taps, axis=-2, mode="mirror")
        np.testing.assert_allclose(filtered[b].numpy(), expected, rtol=0, atol=1e-12)


def test_filter_amplifies_bands_by_powers_of_two() -> None:
    """For t = 2^N, log2 of the ratio of two gains has variance 2; the normalisation cancels in the ratio."""
    stage = FilterStage("filter", (1, 22, 22))
    torch.manual_seed(0)
    gains = stage.draw(torch.zeros(20000, 1, 1, 1, dtype=torch.float64), torch.tensor(1.0))
    for one, other in ((0, 1), (2, 3)):
        ratio = (gains[:, one] / gains[:, other]).log2() / sqrt(2)
        assert scipy.stats.kstest(ratio.numpy(), "norm").pvalue > 0.01


def test_filter_gates_bands_independently() -> None:
    stage = FilterStage("filter", (1, 22, 22))
    torch.manual_seed(0)
    gains = stage.draw(torch.zeros(20000, 1, 1, 1, dtype=torch.float64), torch.tensor(0.3))
    # Bands that did not fire share one gain; if at most one band fired, at least three gains are equal.
    equal = (gains[:, :, None] / gains[:, None, :] - 1).abs() < 1e-9
    at_most_one = (equal.sum(dim=(1, 2)) >= 10).double().mean().item()
    expected = 0.7**4 + 4 * 0.3 * 0.7**3
    assert abs(at_most_one - expected) < 5 * sqrt(expected * (1 - expected) / 20000)


def test_noise_has_the_specified_distribution() -> None:
    stage = NoiseStage("noise", (3, 32, 32))
    torch.manual_seed(0)
    noise = stage.draw(torch.zeros(2000, 3, 32, 32), torch.tensor(0.4))
    sigma = noise.flatten(1).std(dim=1)  # (2000,), within about 2 % of the drawn sigma
    fired = sigma > 0
    assert abs(fired.float().mean().item() - 0.4) < 5 * sqrt(0.4 * 0.6 / 2000)
    assert sigma[fired].square().mean().sqrt().item() == pytest.approx(0.1, rel=0.1)  # sigma = 0.1 |N|
    assert sigma[fired].mean().item() == pytest.approx(0.1 * sqrt(2 / pi), rel=0.1)
    scaled = noise[sigma > 0.01] / sigma[sigma > 0.01][:, None, None, None]
    assert scaled.mean().abs().item() < 0.005
    assert scaled.pow(4).mean().item() == pytest.approx(3, rel=0.01)  # ratio of a normal distribution
    images = torch.randn(2000, 3, 1, 1)
    assert torch.equal(stage.transform(images, noise), images + noise)


def test_cutout_zeroes_the_expected_rectangle() -> None:
    stage = CutoutStage("cutout", (2, 9, 14))
    values = torch.tensor([[0.5, 0.5, 0.25], [0.03, 0.9, 0.25], [0.4, 0.4, 0.0]])
    masked = stage.transform(torch.ones(3, 2, 9, 14), values)
    for b, (center_x, center_y, radius) in enumerate(values.tolist()):
        for y in range(9):
            for x in range(14):
                inside = abs((x + 0.5) / 14 - center_x) < radius and abs((y + 0.5) / 9 - center_y) < radius
                assert masked[b, :, y, x].tolist() == [0.0 if inside else 1.0] * 2


def test_cutout_positions_are_uniform() -> None:
    stage = CutoutStage("cutout", (1, 8, 8))
    torch.manual_seed(0)
    values = stage.draw(torch.zeros(20000, 1, 8, 8), torch.tensor(0.3))
    assert set(values[:, 2].tolist()) == {0.0, 0.25}
    assert abs((values[:, 2] > 0).float().mean().item() - 0.3) < 5 * sqrt(0.3 * 0.7 / 20000)
    for center in (values[:, 0], values[:, 1]):  # uniform
        assert abs(center.mean().item() - 0.5) < 5 * sqrt(1 / 12 / 20000)
        assert center.var().item() == pytest.approx(1 / 12, rel=0.05)


# ---------------------------------------------------------------------------------------------- gates


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_gates_fire_with_their_probability(p: float) -> None:
    B = 20000
    share = {"xflip": 0.5, "rotate90": 0.75, "lumaflip": 0.5}  # share of draws that differ from the identity
    for table, names in ((GEOMETRY, GEOMETRY_BY_HAND), (COLOR, COLOR_NAMES)):
        transforms = [row(table, name) for name in names]
        torch.manual_seed(0)
        size = (1 << 20, 1 << 20)  # large enough that an integer shift is never 0
        u, n = torch.rand(8, 3, B, dtype=torch.float64), torch.randn(8, 2, B, dtype=torch.float64)
        drawn = RandomMatrices([transforms], size).matrices(u, n, torch.tensor(p))
        for transform, matrix in zip(transforms, drawn, strict=False):  # the drawn matrices end with identities
            frequency = ((matrix - torch.eye(4)).abs().amax(dim=(1, 2)) > 1e-9).double().mean().item()
            chance = 1 - sqrt(1 - p) if transform.name.startswith("rotate_") else p
            chance *= share.get(transform.name, 1)
            assert abs(frequency - chance) <= 5 * sqrt(chance * (1 - chance) / B), transform.name


def test_color_strength_scales_the_gates_of_colors_only() -> None:
    """A transform fires where u < strength * p; the draws are those of strength 1."""
    p, B = 0.6, 1000
    images = torch.zeros(B, 3, 8, 8, dtype=torch.float64)
    for strength in (0.0, 0.5, 1.0):
        stage = AffineStage("bgcc", (3, 8, 8), color_strength=strength)
        torch.manual_seed(0)
        u, n = torch.rand(16, 3, B, dtype=torch.float64), torch.randn(16, 2, B, dtype=torch.float64)
        drawn = stage.random_matrices.matrices(u, n, torch.tensor(p))  # coordinates and colours in turn
        fired = ((drawn - torch.eye(4)).abs().amax(dim=(2, 3)) > 1e-9).view(8, 2, B)
        colors = COLOR_NAMES[::-1]
        for name in ("brightness", "contrast", "hue", "saturation"):
            i = colors.index(name)
            assert torch.equal(fired[i, 1], u[2 * i + 1, 2] < strength * p), name
        assert torch.equal(fired[3, 0], u[6, 2] < p)  # scale
        torch.manual_seed(0)
        maps = stage.draw(images, torch.tensor(p))
        torch.testing.assert_close(maps, stage.random_matrices.products(drawn), rtol=0, atol=0)


def test_color_strength_one_changes_no_gate() -> None:
    """The threshold is the same number, to the last bit, as without a strength."""
    p = torch.tensor([0.0, 1e-4, 0.1, 1 / 3, 0.55, 0.7, 1.0])
    matrices = AffineStage("bgc", (3, 8, 8)).random_matrices
    assert matrices.strength.eq(1).all()
    for value in p:
        chance = torch.addcmul(matrices.strength, matrices.strength, (1 - value) ** matrices.share, value=-1)
        assert torch.equal(chance, 1 - (1 - value) ** matrices.share)


def test_either_rotation_fires_with_probability_p() -> None:
    B, p = 20000, 0.6
    torch.manual_seed(0)
    rotations = [t for t in GEOMETRY if t.name in ("rotate_pre", "rotate_post")]
    u, n = torch.rand(2, 3, B), torch.randn(2, 2, B)
    pre, post = RandomMatrices([rotations], (32, 32)).matrices(u, n, torch.tensor(p))
    fired = ((pre[:, 0, 1] != 0) | (post[:, 0, 1] != 0)).double().mean().item()
    assert abs(fired - p) < 5 * sqrt(p * (1 - p) / B)


def test_the_axes_of_a_shift_share_a_gate() -> None:
    shifts = [t for t in GEOMETRY if t.name in ("xint", "xfrac")]
    torch.manual_seed(0)
    u, n = torch.rand(2, 3, 500) * 0.3, torch.randn(2, 2, 500)  # u away from the centre, so no shift rounds to 0
    for matrix in RandomMatrices([shifts], (64, 64)).matrices(u, n, torch.tensor(0.15)):
        assert torch.equal(matrix[:, 0, 3] != 0, matrix[:, 1, 3] != 0)
        assert 150 < (matrix[:, 0, 3] != 0).sum() < 350


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"mode": "on"}, "mode"),
        ({"pipe": "gbc"}, "pipe"),
        ({"mode": "fixed"}, "p"),
        ({"mode": "fixed", "p": 1.2}, "p"),
        ({"mode": "fixed", "p": float("nan")}, "p"),
        ({"mode": "ada", "p": 0.2}, "p"),
        ({"mode": "noaug", "p": 0.2}, "p"),
        ({"mode": "apa", "p": 0.2}, "p"),
        ({"target": 1.5}, "target"),
        ({"ada_kimg": 0}, "ada_kimg"),
        ({"ada_interval": 0}, "ada_interval"),
        ({"max_p": 0}, "max_p"),
        ({"max_p": 1.1}, "max_p"),
        ({"color_strength": 1.5}, "color_strength"),
        ({"color_strength": -0.1}, "color_strength"),
    ],
)
def test_invalid_configurations_are_refused(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as error:
        AugmentConfig(**changes)  # type: ignore[arg-type]
    assert error.value.field == field


def test_an_unknown_pipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=", ".join(PIPES)):
        AugmentConfig(pipe="all")


@pytest.mark.parametrize(
    ("pipe", "img_shape", "message"),
    [
        ("bgcf", (3, 21, 64), "at least 22 pixels.*21x64"),
        ("bgc", (2, 32, 32), "1, 3 or 4 channels, but the images have 2"),
        ("color", (5, 32, 32), "1, 3 or 4 channels, but the images have 5"),
        ("blit", (3, 2, 32), "2x32 are too small"),
    ],
)
def test_images_that_a_pipe_cannot_augment_are_refused(
    pipe: str, img_shape: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(pipe, img_shape, p=0.5)


# ---------------------------------------------------------------------------------------------- controller


@pytest.mark.parametrize("mode", ["ada", "apa"])
def test_the_controller_follows_the_formula(mode: str) -> None:
    controller = ada(mode=mode, target=0.6, ada_kimg=2, ada_interval=4, max_p=0.3)
    signs = [0.9, 0.7, 0.5, 0.6] * 6 + [0.5, 0.6, 0.6, 0.5] * 9 + [1.0] * 4
    p = 0.0
    for step, sign in enumerate(signs, start=1):
        controller.observe(torch.tensor(sign), NEVER)
        controller.update(step, 32)
        if step % 4 == 0:
            mean = sum(signs[step - 4 : step]) / 4
            p = min(max(p + (1 if mean > 0.6 else -1) * 32 * 4 / 2000, 0.0), 0.3)
        assert controller.pipe.p.item() == pytest.approx(p, abs=1e-6)
        if step == 20:
            assert controller.is_saturated(controller.pipe.p.item())
        if step == 60:
            assert controller.pipe.p.item() == 0
            assert not controller.is_saturated(0.0)
    assert p == pytest.approx(0.064)


def test_the_controller_ignores_skipped_observations() -> None:
    controller = ada(target=0.6, ada_kimg=1, ada_interval=1)
    controller.observe(torch.tensor(float("nan")), torch.tensor(True))
    controller.observe(torch.tensor(0.9), NEVER)
    controller.update(1, 32)
    assert controller.pipe.p.item() == pytest.approx(0.032)


def test_the_controller_keeps_p_without_observations() -> None:
    controller = ada(ada_kimg=1)
    controller.pipe.p.fill_(0.5)
    controller.update(4, 32)
    assert controller.pipe.p.item() == 0.5


def test_the_controller_resumes_exactly() -> None:
    def run(controller: AdaController, steps: range) -> None:
        for step in steps:
            controller.observe(torch.tensor(0.5 + 0.4 * sin(step)), NEVER)
            controller.update(step, 48)

    straight, first, second = (ada(ada_kimg=3, target=0.45) for _ in range(3))
    run(straight, range(1, 40))
    run(first, range(1, 19))  # stop in the middle of an interval
    saved = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second.load_state_dict(saved)
    run(second, range(19, 40))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor)
    assert straight.pipe.p > 0


def test_the_controller_refuses_an_unknown_state() -> None:
    with pytest.raises(ValueError, match="sign_sum"):
        ada().load_state_dict({"p": torch.tensor(0.1)})


def test_a_fixed_p_never_changes() -> None:
    config = AugmentConfig(mode="fixed", pipe="color", p=1.0)
    controller = AdaController(config, AugmentPipe(config, (3, 8, 8)))
    for step in range(1, 9):
        controller.observe(torch.tensor(-1.0), NEVER)
        controller.update(step, 1000)
    assert controller.pipe.p.item() == 1.0
    assert not controller.is_saturated(1.0)


def test_the_blur_equals_that_of_scipy() -> None:
    images = torch.randn(2, 3, 20, 24)
    pipe = AugmentPipe(AugmentConfig(mode="noaug", blur=1.7), (3, 20, 24))
    expected = scipy.ndimage.gaussian_filter(
        images.double().numpy(), 1.7, axes=(2, 3), mode="constant", radius=ceil(3 * 1.7)
    )
    np.testing.assert_allclose(pipe(images), expected, atol=1e-5)
    small = AugmentPipe(AugmentConfig(mode="noaug", blur=1.7), (1, 5, 6)).double()
    inputs = (torch.randn(1, 1, 5, 6).double().requires_grad_(),)
    assert torch.autograd.gradgradcheck(lambda x: small(x).square(), inputs)


def test_the_blur_follows_its_schedule_to_nothing() -> None:
    config = AugmentConfig(mode="noaug", blur=Schedule(4.0, 0.0, length=1000))
    pipe = AugmentPipe(config, (3, 20, 24))
    controller, images = AdaController(config, pipe), torch.randn(2, 3, 20, 24)
    for nimg, sigma in ((0, 4.0), (500, 2.0), (1000, 0.0), (5000, 0.0)):
        controller.follow_schedule(nimg)
        assert float(pipe.sigma) == pytest.approx(sigma, abs=1e-6)
        assert torch.allclose(pipe(images), images, atol=1e-6) == (sigma == 0)
