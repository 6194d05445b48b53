"""Path length against closed forms for a known distance; LPIPS against its definition; FID per class."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from metric_helpers import ArrayImages, SmallDetector, Stripes, natural_images, script_program
from torch import Tensor, nn

import metrics
from dnnlib.config import UserError
from metrics import detectors, path_length
from metrics.class_frechet import class_distances
from metrics.detectors import Detector, DetectorSetup, read_detectors
from metrics.frechet import frechet_distance
from metrics.kernel import squared_mmd
from metrics.path_length import trimmed_mean
from metrics.precision_recall import precision_recall
from metrics.registry import compute_all
from metrics.sampling import MetricContext, fake_batches, random_labels
from metrics.sliced_wasserstein import sliced_wasserstein
from torch_utils.interpolation import slerp

CPU = torch.device("cpu")


class Linear:
    """Generator with w = z + 1 and image = A w: a step in w changes the image by eps A (w1 - w0)."""

    z_dim, c_dim = 4, 0
    img_shape = (1, 32, 32)

    def __init__(self) -> None:
        self.A = torch.randn(4, 1024, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.ws: list[Tensor] = []

    def mapping(self, z: Tensor, c: Tensor, truncation_psi: float = 1) -> Tensor:
        return (z + 1).unsqueeze(1).expand(-1, 3, -1)

    def synthesis(self, ws: Tensor, noise_mode: str) -> Tensor:
        ws = ws.double()
        self.ws.append(ws)
        return (ws[:, 0] @ self.A).reshape(-1, 1, 32, 32)

    def __call__(self, z: Tensor, c: Tensor, truncation_psi: float = 1, **_: Any) -> Tensor:
        return self.synthesis(self.mapping(z, c), "const")


class SquaredDistance(DetectorSetup):
    """Setup that replaces LPIPS with the squared distance of images."""

    def prepare(self, role: str) -> None: ...

    def identity(self, role: str) -> dict[str, str]:
        return {"detector": "square", "detector_sha256": "0"}

    def load_similarity(self, device: torch.device) -> Any:
        return lambda one, other: ((one - other) / 127.5).square().sum(dim=(1, 2, 3)) / 3


def build(G: Any, **changes: Any) -> MetricContext:
    settings: dict[str, Any] = {"images": ArrayImages(natural_images(4, G.img_shape)), "setup": SquaredDistance()}
    return MetricContext(G=G, device=CPU, **(settings | changes))


def test_path_length_in_w_equals_a_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", lambda x: x)  # stay in float64: steps of 1e-4 leave few digits in float32
    G = Linear()
    [end] = compute_all(["ppl2_wend200"], build(G, batch_size=64))
    assert end.metric == "ppl2_wend200_tvgg16"
    assert end.num_fake == 400
    w = torch.cat([pair.chunk(2)[0] for pair in G.ws])[:, 0], torch.cat([pair.chunk(2)[1] for pair in G.ws])[:, 0]
    moves = ((w[1] - w[0]) @ G.A / 1e-4).square().sum(dim=1)
    assert end.results["ppl2_wend200_tvgg16"] == pytest.approx(trimmed_mean(moves.numpy()), rel=1e-6)
    # E|A (w1 - w0)|^2 = 2 |A|^2 for independent standard normal latents
    assert float(moves.mean()) == pytest.approx(2 * float(G.A.square().sum()), rel=0.15)

    G.ws.clear()
    [full] = compute_all(["ppl_wfull200"], build(G, batch_size=10))  # distance of the crop: rows 12-27, columns 8-23
    crop = G.A.reshape(4, 32, 32)[:, 12:28, 8:24].reshape(4, -1)
    starts = torch.cat([pair.chunk(2)[0] for pair in G.ws])[:, 0], torch.cat([pair.chunk(2)[1] for pair in G.ws])[:, 0]
    moves = ((starts[1] - starts[0]) @ crop / 1e-4).square().sum(dim=1)
    assert full.results["ppl_wfull200_tvgg16"] == pytest.approx(trimmed_mean(moves.numpy()), rel=1e-6)
    # At t = 0 the latent is standard normal; at a uniform t its variance is E[t^2 + (1 - t)^2] = 2/3.
    assert float((w[0] - 1).var()) == pytest.approx(1, rel=0.15)
    assert float((starts[0] - 1).var()) == pytest.approx(2 / 3, rel=0.15)


def test_steps_in_z_follow_great_circles() -> None:
    """At t = 0, a step has length |b| - |a| along a, and |a| times the angle between a and b perpendicular to a.

    For standard normal a, b in 4 dimensions: E[(|b| - |a|)^2] = 2 (4 - 9 pi / 8), E|a|^2 = 4, and the squared angle
    has the mean pi^2/3 - 1/2. With linear interpolation, E|b - a|^2 would be 8.
    """
    walk = path_length.Walk(space="z", at_end=True, crop=False)
    G = Linear()
    G.A = torch.eye(4, 1024, dtype=torch.float64)  # the first pixels of the image are z
    pairs = list(path_length.steps(build(G, batch_size=4000), walk, 2000))
    moves = torch.cat([(other - one).square().sum(dim=(1, 2, 3)) for one, other in pairs]) / 1e-4**2
    expected = 2 * (4 - 9 * np.pi / 8) + 4 * (np.pi**2 / 3 - 1 / 2)
    assert float(moves.mean()) == pytest.approx(expected, rel=0.06)


def test_path_length_does_not_depend_on_the_batch_size() -> None:
    one, other = (next(compute_all(["ppl_zend50"], build(Linear(), batch_size=size))) for size in (100, 7))
    assert one.results == pytest.approx(other.results, rel=1e-2)


def test_tf32_is_disabled_while_metrics_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 is enabled globally (as for a snapshot with --allow-tf32), disabled during metrics, and then restored."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    seen: list[bool] = []

    def recording(function: Any) -> Any:
        def recorded(*args: Any, **options: Any) -> Any:
            seen.extend([torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32])
            return function(*args, **options)

        return recorded

    for owner, name in ((Linear, "mapping"), (Linear, "synthesis"), (torch, "addmm")):
        monkeypatch.setattr(owner, name, recording(getattr(owner, name)))
    for name in ("ppl2_wend8", "ppl_zfull8"):
        next(compute_all([name], build(Linear())))
    precision_recall(torch.rand(9, 4), torch.rand(9, 4))
    squared_mmd(torch.rand(9, 4), torch.rand(9, 4))
    sliced_wasserstein(*torch.zeros(2, 3, 1, 8, 8, dtype=torch.uint8))
    Detector(name="any", network=recording(lambda images: (images, None)))(torch.zeros(1))
    assert len(seen) == 2 * (3 + 2 + 3 + 3 + 2 + 1)
    assert not any(seen)
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32


def test_slerp_follows_the_great_circle() -> None:
    a, b = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.full((5, 1), 0.3, dtype=torch.float64)
    torch.testing.assert_close(slerp(a, b, 0 * t), a)
    torch.testing.assert_close(slerp(a, b, 0 * t + 1), b)
    angle = torch.cosine_similarity(a, b).acos()
    torch.testing.assert_close(torch.cosine_similarity(a, slerp(a, b, t)).acos(), 0.3 * angle)
    torch.testing.assert_close(torch.cosine_similarity(slerp(a, b, t), b).acos(), 0.7 * angle)


def test_trimming_removes_both_tails() -> None:
    values = np.arange(1000.0)
    values[-5:] = 1e9
    values[:5] = -1e9
    shuffled = np.random.RandomState(0).permutation(values)
    assert trimmed_mean(shuffled) == pytest.approx(np.arange(9, 991).mean(), abs=0.51)
    # The 1st percentile of 150 values lies between the second and third, the 99th between the 148th and 149th.
    assert trimmed_mean(np.arange(150.0) ** 2) == pytest.approx((np.arange(1, 149.0) ** 2).mean(), rel=1e-12)


def test_lpips_input_is_downsampled_and_converted_to_rgb() -> None:
    img = torch.rand(1, 1, 1024, 1024, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = path_length.lpips_input(img, crop=False)
    assert seen.shape == (1, 3, 256, 256)
    torch.testing.assert_close(seen[0, 2, 3, 5], (img[0, 0, 12:16, 20:24].mean() + 1) * 127.5)
    assert path_length.lpips_input(img[:, :, :300, :300], crop=False).shape == (1, 3, 300, 300)
    with pytest.raises(UserError, match="needs at least 16 pixels per side, but the face crop has 8"):
        path_length.lpips_input(img[:, :, :16, :16], crop=True)


@pytest.mark.parametrize("name", ["ppl2_wend", "ppl_wfull", "ppl_wend"])
def test_path_length_in_w_requires_a_network_with_w(name: str) -> None:
    with pytest.raises(
        UserError, match=f"metric {name}50_tvgg16: Stripes has no style space w .* ppl_zend or ppl_zfull"
    ):
        metrics.compute(f"{name}50", build(Stripes((1, 32, 32))))
    assert metrics.compute("ppl_zend20", build(Stripes((1, 32, 32)))).results["ppl_zend20_tvgg16"] > 0


def test_path_length_requires_a_network_and_equal_noise() -> None:
    images = ArrayImages(natural_images(4))
    context = MetricContext(fakes=images, images=images, device=CPU, setup=SquaredDistance())
    with pytest.raises(
        UserError, match="metric ppl2_wend_tvgg16: needs a network, but only generated images are given"
    ):
        metrics.compute("ppl2_wend", context)
    with pytest.raises(UserError, match="both ends of a step need the same noise"):
        metrics.compute("ppl_zend", build(Linear(), noise_mode="random"))


def test_lpips_equals_its_definition() -> None:
    """Sum over five layers of mean_xy sum_c lin_c (f/|f| - g/|g|)^2, f and g activations (Zhang et al. 2018)."""
    pytest.importorskip("torch_fidelity")
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    vgg = torchvision.models.vgg16(init_weights=False).eval()
    widths = (64, 128, 256, 512, 512)
    linear = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(widths)}
    images = natural_images(4, (3, 32, 32)).float()
    measured = detectors.load_lpips(vgg.state_dict(), linear, CPU)(images[:2], images[2:])

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (images / 255 - mean[:, None, None]) / std[:, None, None]
    expected = torch.zeros(2)
    found = 0
    with torch.no_grad():
        for number, layer in enumerate(vgg.features):
            x = layer(x)
            if number in (3, 8, 15, 22, 29):
                unit = nn.functional.normalize(x, dim=1)
                difference = (unit[:2] - unit[2:]).square() * linear[f"lin{found}.model.1.weight"]
                expected += difference.sum(dim=1).mean(dim=(1, 2))
                found += 1
    torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-5)
    assert expected.min() > 0.01


# FID per class.


def test_class_distances_equal_those_of_separate_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(60, 4, generator=generator) for _ in range(2))
    real_class, fake_class = (torch.randint(3, [60], generator=generator) for _ in range(2))
    measured = class_distances(real, real_class, fake, fake_class, 3)
    for number in range(3):
        sets = [x[labels == number].double() for x, labels in ((real, real_class), (fake, fake_class))]
        covs = [x.T.cov(correction=0) for x in sets]
        expected = frechet_distance(sets[0].mean(0), covs[0], sets[1].mean(0), covs[1])
        assert float(measured[number]) == pytest.approx(expected, rel=1e-9)
    unused = class_distances(real, 2 * real_class, fake, 2 * fake_class, 6)
    assert unused.isnan().tolist() == [False, True, False, True, False, True]
    torch.testing.assert_close(unused[::2], measured)
    real_class[0], fake_class[:] = 3, fake_class.clamp(max=2)
    with pytest.raises(UserError, match="class 3 has 1 reals and 0 fakes"):
        class_distances(real, real_class, fake, fake_class, 4)


@pytest.fixture(scope="module")
def detector_setup(tmp_path_factory: pytest.TempPathFactory) -> DetectorSetup:
    path = script_program(tmp_path_factory.mktemp("detector") / "small.pt", SmallDetector())
    return read_detectors((f"inception:{path}",))


def test_fid_per_class_pairs_reals_and_fakes_of_a_class(detector_setup: DetectorSetup) -> None:
    images = natural_images(60)
    classes = torch.arange(60) % 3
    images[classes == 2] = 255 - images[classes == 2] // 4
    data = ArrayImages(images, classes, c_dim=4)  # class 3 has no images
    context = MetricContext(G=Stripes(c_dim=4), images=data, device=CPU, setup=detector_setup)
    [result] = compute_all(["fid80_class"], context)
    per_class = [result.results[f"fid80_class_{number}"] for number in range(3)]
    assert result.results["fid80_class"] == pytest.approx(sum(per_class) / 3)
    assert result.results["fid80_class_worst"] == max(per_class)
    assert len(result.results) == 5

    labels = random_labels(context, range(80)).argmax(dim=1)
    [fakes] = [torch.cat([batch for _, batch in fake_batches(context, 80)])]
    real, fake = (SmallDetector()(x)[0].double() for x in (images[classes == 2], fakes[labels == 2]))
    expected = frechet_distance(real.mean(0), real.T.cov(correction=0), fake.mean(0), fake.T.cov(correction=0))
    assert per_class[2] == pytest.approx(expected, rel=1e-6)

    same = MetricContext(fakes=data, images=data, device=CPU, setup=detector_setup)
    [zero] = compute_all(["fid60_class"], same)
    assert zero.results["fid60_class"] == pytest.approx(0, abs=1e-9)
    assert zero.warnings == ()


def test_a_class_without_fakes_is_refused_before_generation(detector_setup: DetectorSetup) -> None:
    data = ArrayImages(natural_images(60), torch.arange(60) % 3, c_dim=3)
    G = Stripes(c_dim=3)
    with pytest.raises(UserError, match=r"metric fid4_class: class \d has 20 reals and [01] fakes"):
        metrics.compute("fid4_class", MetricContext(G=G, images=data, device=CPU, setup=detector_setup))
    assert G.latents == []


def test_fid_per_class_requires_classes(detector_setup: DetectorSetup) -> None:
    images = ArrayImages(natural_images(20))
    with pytest.raises(UserError, match="metric fid20_class: needs classes"):
        metrics.compute("fid20_class", MetricContext(G=Stripes(), images=images, device=CPU, setup=detector_setup))
