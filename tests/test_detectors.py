"""Detectors: fetching and checking weights, the real loading code with random weights, programs, invalid files."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_helpers import (
    SmallDetector,
    export_program,
    metric_context,
    natural_images,
    random_inception,
    script_program,
)
from PIL import Image
from torch import Tensor, nn
from web import Site

import metrics
from dnnlib.config import UserError
from metrics import detectors, weights
from metrics.detectors import DetectorSetup, read_detectors
from metrics.weights import INCEPTION, WeightFile

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "detectors"


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as site:
        yield site


def publish(site: Site, name: str, data: bytes, **changes: str) -> WeightFile:
    """Put a weight file on the test site."""
    checksum = hashlib.sha256(data).hexdigest()
    site.files[f"/{name}"] = data
    return WeightFile(
        **({"name": name, "url": f"{site.url}/{name}", "sha256": checksum[:8], "content": "test"} | changes)
    )


# Fetching.


def test_a_file_is_fetched_once_and_checked(cache: Path, site: Site) -> None:
    file = publish(site, "net.pth", b"weights")
    assert weights.fetch(file) == cache / "net.pth"
    assert (cache / "net.pth").read_bytes() == b"weights"
    site.files.clear()
    assert weights.fetch(file) == cache / "net.pth"
    assert [path.name for path in cache.iterdir()] == ["net.pth"]

    (cache / "net.pth").write_bytes(b"weig")
    with pytest.raises(UserError, match=rf"net\.pth: its sha256 is .*, but that of net\.pth begins with {file.sha256}"):
        weights.fetch(file)


def test_a_download_with_a_wrong_checksum_is_discarded(cache: Path, site: Site) -> None:
    with pytest.raises(UserError, match=r"could not be fetched: .*its sha256 is"):
        weights.fetch(publish(site, "net.pth", b"an error page", sha256="00000000"))
    assert list(cache.iterdir()) == []


def test_a_truncated_download_is_discarded(cache: Path, site: Site) -> None:
    """The truncation is detected even without a published checksum, as for LPIPS."""
    file = publish(site, "net.pth", b"weights", sha256="")
    site.breaks["/net.pth"] = [4, 0]
    with pytest.raises(UserError, match="could not be fetched"):
        weights.fetch(file)
    assert not (cache / "net.pth").exists()


def test_the_offline_error_names_the_file_and_the_cache_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("dnnlib.download.requests.Session.get", offline)
    context = metric_context(natural_images(2))
    with pytest.raises(UserError) as caught:
        metrics.compute("fid50k_full", context)
    for words in (
        "metric fid50k_full",
        INCEPTION.name,
        "sha256 6726825d",
        str(cache),
        "--detector=FILE",
        INCEPTION.url,
    ):
        assert words in str(caught.value)
    assert context.network.latents == []  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"fd_dinov2: .*put config\.json and model\.safetensors"):
        metrics.compute("fd_dinov2", context)


# The real networks, with random weights.


@pytest.fixture(scope="module")
def inception_state() -> dict[str, Tensor]:
    pytest.importorskip("torch_fidelity")
    return random_inception()


def test_inception_equals_torch_fidelity_including_the_resize(
    inception_state: dict[str, Tensor], tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our detector is loaded from the cache; torch-fidelity loads the same file itself."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    source = tmp_path / INCEPTION.name
    torch.save(inception_state, source)
    file = publish(site, source.name, source.read_bytes())
    monkeypatch.setattr(detectors, "FILES", {**detectors.FILES, "inception": (file,)})
    images = natural_images(3, (3, 20, 24))
    torch.manual_seed(5)
    expected_random = torch.rand(1)
    torch.manual_seed(5)
    setup = DetectorSetup()
    setup.prepare("inception")
    features, logits = setup.load("inception", CPU)(images)
    assert torch.equal(torch.rand(1), expected_random)  # the global random state is unchanged

    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(source))
    with torch.no_grad():
        expected = theirs(images)
    torch.testing.assert_close(features, expected[0])
    torch.testing.assert_close(logits, expected[1])
    assert features.shape == (3, 2048)
    assert features.std(dim=0).mean() > 1e-3
    assert setup.identity("inception")["detector_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()


def test_the_clean_protocol_changes_only_the_resize(inception_state: dict[str, Tensor]) -> None:
    from torch_fidelity import feature_extractor_inceptionv3 as library

    images = natural_images(2, (3, 20, 24))
    resized = torch.stack(
        [
            torch.from_numpy(
                np.stack([np.asarray(Image.fromarray(c.numpy()).convert("F").resize((299, 299), 3)) for c in image])
            )
            for image in images
        ]
    ).clamp(0, 255)
    np.testing.assert_allclose(detectors.clean_resize(images.float(), (299, 299)), resized, atol=2e-3)

    before = library.interpolate_bilinear_2d_like_tensorflow1x
    usual, clean = (detectors.load_inception(inception_state, CPU, clean=clean) for clean in (False, True))
    assert not torch.allclose(usual(images)[0], clean(images)[0], rtol=1e-3)
    assert library.interpolate_bilinear_2d_like_tensorflow1x is before
    exact = natural_images(1, (3, 299, 299))  # nothing to resize
    torch.testing.assert_close(usual(exact)[0], clean(exact)[0], rtol=1e-3, atol=1e-4)


def test_gray_images_are_converted_to_rgb_and_others_refused(inception_state: dict[str, Tensor]) -> None:
    inception = detectors.load_inception(inception_state, CPU, clean=False)
    gray = natural_images(1, (1, 16, 16))
    assert torch.equal(inception(gray)[0], inception(gray.repeat(1, 3, 1, 1))[0])
    with pytest.raises(UserError, match="the images have 4 channels"):
        inception(natural_images(1, (4, 16, 16)))


def test_weights_that_do_not_fit_are_refused(inception_state: dict[str, Tensor]) -> None:
    incomplete = {name: x for name, x in inception_state.items() if name != "fc.bias"}
    with pytest.raises(UserError, match="Inception: the weights do not fit the network"):
        detectors.load_inception(incomplete, CPU, clean=False)


def test_dinov2_equals_the_class_token_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=56
    )
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dino")
    setup = read_detectors((str(tmp_path / "dino"),))
    setup.prepare("dinov2")
    images = natural_images(2, (3, 32, 32))
    features, logits = setup.load("dinov2", CPU)(images)
    assert features.shape == (2, 24)
    assert logits is None

    resized = [Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), 3) for image in images]
    x = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = model(pixel_values=x).pooler_output  # transformers: the class token after the last norm
    assert (detectors.dinov2_input(images) - x).abs().max() < 1.01 / 255 / 0.224  # one gray level of rounding
    torch.testing.assert_close(features, expected, rtol=0.01, atol=0.01)

    name = "DINOv2 of width 24, 2 layers, patches 14: not comparable with ViT-L/14"
    assert setup.identity("dinov2")["detector"] == name
    weights_file = tmp_path / "dino" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load DINOv2 from this folder"):
        setup.load("dinov2", CPU)


@pytest.fixture(scope="module")
def vgg16_state() -> dict[str, Tensor]:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    network: nn.Module = torchvision.models.vgg16(init_weights=False)
    return dict(network.state_dict())


def test_vgg16_returns_the_second_fully_connected_layer(vgg16_state: dict[str, Tensor]) -> None:
    pytest.importorskip("torch_fidelity")
    import torchvision

    images = natural_images(1, (3, 224, 224))
    features, logits = detectors.load_vgg16(vgg16_state, CPU)(images)
    network = torchvision.models.vgg16(init_weights=False).eval()
    network.load_state_dict(vgg16_state)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (images / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        deep = network.avgpool(network.features(x)).flatten(1)
        expected = network.classifier[:5](deep)
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)
    assert logits is None
    assert features.min() == 0


# Programs.


@pytest.mark.parametrize("kind", ["pt2", "pt"])
def test_a_program_returns_features_and_logits(tmp_path: Path, kind: str) -> None:
    images = natural_images(5, (3, 16, 16))
    network = SmallDetector()
    path = tmp_path / f"net.{kind}"
    if kind == "pt2":
        export_program(path, network, images)
    else:
        script_program(path, network)
    detector = read_detectors((str(path),)).load("inception", CPU)
    expected = network(images)
    for actual, target in zip(detector(images), expected, strict=True):
        torch.testing.assert_close(actual, target)
    assert detector(images[:1])[0].shape == (1, 6)


class WithConstant(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().flatten(1) * torch.arange(images[0].numel(), device=images.device)


def test_an_exported_program_moves_to_another_device(tmp_path: Path) -> None:
    images = natural_images(2, (3, 16, 16))
    path = export_program(tmp_path / "net.pt2", WithConstant(), images)
    module, _ = detectors.load_module(path, torch.device("meta"))
    assert {str(node.kwargs["device"]) for node in module.graph.nodes if "device" in node.kwargs} == {"meta"}
    assert module(images.to("meta")).shape == (2, 768)


@pytest.mark.gpu
def test_an_exported_program_runs_on_a_gpu(tmp_path: Path) -> None:
    images, network = natural_images(2, (3, 16, 16)), WithConstant()
    detector = detectors.load_program(export_program(tmp_path / "net.pt2", network, images), torch.device("cuda"))
    torch.testing.assert_close(detector(images.cuda())[0].cpu(), network(images))


def test_stylegan_programs_are_called_with_return_features(tmp_path: Path) -> None:
    class Probabilities(nn.Module):
        def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
            x = images.float().mean(dim=(2, 3))
            return x if return_features else x.softmax(dim=1)

    images = natural_images(2, (3, 16, 16))
    path = script_program(tmp_path / "inception.pt", Probabilities())
    features, logits = detectors.load_program(path, CPU)(images)
    torch.testing.assert_close(features, images.float().mean(dim=(2, 3)))
    assert logits is None


def test_a_program_with_invalid_output_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Flat(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.float().mean(dim=(1, 2, 3))

    path = script_program(tmp_path / "flat.pt", Flat())
    with pytest.raises(UserError, match=r"flat\.pt: for uint8 images \(2, 3, 16, 16\) it returned \[\(2,\)\], expect"):
        detectors.load_program(path, CPU)(natural_images(2, (3, 16, 16)))
    gray_only = export_program(tmp_path / "gray.pt2", SmallDetector(1), natural_images(2, (1, 16, 16)))
    with pytest.raises(UserError, match=r"gray\.pt2: failed on uint8 images \(2, 3, 16, 16\)"):
        detectors.load_program(gray_only, CPU)(natural_images(2, (3, 16, 16)))
    (tmp_path / "broken.pt2").write_bytes(gray_only.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"broken\.pt2: cannot be loaded"):
        detectors.load_program(tmp_path / "broken.pt2", CPU)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_program_of_fixed_batch_size_is_refused_immediately(tmp_path: Path) -> None:
    images = natural_images(2, (3, 16, 16))
    path = tmp_path / "fixed.pt2"
    torch.export.save(torch.export.export(SmallDetector().eval(), (images,)), path)
    context = metric_context(images, setup=read_detectors((str(path),)))
    with pytest.raises(UserError, match=r"fid50_full_fixed: .*fixed\.pt2: failed on uint8 images \(1, 3, 16, 16\)"):
        metrics.compute("fid50_full", context)
    assert context.network.latents == []  # type: ignore[attr-defined]


def test_a_package_that_fails_to_import_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision raises RuntimeError if it was built for another version of torch."""

    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(detectors.importlib, "import_module", broken)
    with pytest.raises(UserError, match=r"package torch-fidelity cannot be imported \(operator torchvision::nms"):
        detectors.load_inception({}, CPU, clean=False)


def test_detector_options_are_validated(tmp_path: Path) -> None:
    program = script_program(tmp_path / "net.pt", SmallDetector())
    with pytest.raises(UserError, match="no such file"):
        read_detectors((str(tmp_path / "missing.pt"),))
    with pytest.raises(UserError, match="is already given; use inception:FILE or vgg16:FILE"):
        read_detectors((str(program), str(program)))
    with pytest.raises(UserError, match=r"vgg16:.*: not a program .*; omit `vgg16:`"):
        read_detectors((f"vgg16:{tmp_path}",))
    other = script_program(tmp_path / "other.pt", SmallDetector())
    setup = read_detectors((str(program), f"vgg16:{other}"))
    assert [setup.identity(role)["detector"] for role in ("inception", "vgg16")] == ["net.pt", "other.pt"]
    wrong = tmp_path / INCEPTION.name
    wrong.write_bytes(b"not the weights")
    with pytest.raises(UserError, match=r"its sha256 is .*begins with 6726825d.*a different file$"):
        read_detectors((str(wrong),))
    unknown = tmp_path / "other.pth"
    torch.save({"x": torch.zeros(1)}, unknown)
    with pytest.raises(UserError, match=r"neither a program .* nor one of weights-inception"):
        read_detectors((str(unknown),))


def test_a_renamed_weight_file_is_identified_by_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "renamed.pth"
    torch.save({"x": torch.zeros(1)}, path)
    file = dataclasses.replace(INCEPTION, sha256=hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    monkeypatch.setattr(detectors, "KNOWN", (file,))
    assert read_detectors((str(path),)).weights == {INCEPTION.name: path}


class TouchesFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (self.path.touch, ())


def test_a_state_dict_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    path.write_bytes(pickle.dumps({"x": TouchesFile(tmp_path / "fired")}))
    with pytest.raises(UserError, match=r"bomb\.pth: cannot be read as a state dict"):
        detectors.load_state_dict(path)
    assert not (tmp_path / "fired").exists()
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="is not a state dict of tensors"):
        detectors.load_state_dict(path)
