"""Code written for StyleGAN2-ADA runs: loading, calling and copying networks, reading datasets."""

from __future__ import annotations

import copy
import gzip
import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from exploration_helpers import FAMILIES, build, make_snapshot
from foreign_files import Call, Name, dumps, styleformer_module, stylegan2_module, write
from PIL import Image
from snapshot_helpers import make_snapshot as make_whole_snapshot
from torch import nn
from web import Site

import dnnlib
import generate
import legacy
import training.dataset
from dnnlib.config import UserError
from torch_utils import misc
from training.networks import execution
from training.networks.generator import Generator
from training.networks.styleformer import StyleformerConfig
from training.networks.stylegan2 import StyleGAN2Config
from training.networks.stylegan2_discriminator import StyleGAN2DiscriminatorConfig

SHAPES = (Path(__file__).parent.parent / "docs" / "shapes.pkl").read_bytes()

# Script of a StyleGAN2-ADA user; `network_pkl`, `seed`, `device` and `outdir` are defined.
SCRIPT = """
import copy
import dnnlib
import legacy
import numpy as np
import PIL.Image
import torch
from torch_utils import misc

print('Loading networks from "%s"...' % network_pkl)
with dnnlib.util.open_url(network_pkl) as f:
    G = legacy.load_network_pkl(f)['G_ema'].to(device)

z = torch.from_numpy(np.random.RandomState(seed).randn(1, G.z_dim)).to(device)
label = torch.zeros([1, G.c_dim], device=device)
img = G(z, label, truncation_psi=0.7, noise_mode='const')
pixels = (img.permute(0, 2, 3, 1) * 127.5 + 128).clamp(0, 255).to(torch.uint8)
PIL.Image.fromarray(pixels[0].cpu().numpy()).save(f'{outdir}/seed{seed:04d}.png')

w_avg = G.mapping.w_avg
ws = G.mapping(z, None)
cut = G.mapping(z, label, truncation_psi=0.5, truncation_cutoff=2)
synth = G.synthesis(cut, noise_mode='const', force_fp32=True)
assert synth.shape == (1, G.img_channels, G.img_resolution, G.img_resolution)
assert ws.shape == (1, G.num_ws, G.w_dim)
for name in ('num_ws', 'w_dim', 'img_resolution', 'img_channels'):
    assert getattr(G.synthesis, name) == getattr(G, name)

w = torch.tensor(w_avg[None, None].cpu().numpy(), device=device, requires_grad=True)
noise_bufs = {name: buf for (name, buf) in G.synthesis.named_buffers() if 'noise_const' in name}
for buf in noise_bufs.values():
    buf[:] = torch.randn_like(buf)
    buf.requires_grad = True
optimizer = torch.optim.Adam([w] + list(noise_bufs.values()), betas=(0.9, 0.999), lr=0.1)
losses = []
for step in range(10):
    moved = G.synthesis(w.repeat([1, G.num_ws, 1]), noise_mode='const')
    loss = (moved - img).square().mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

G2 = copy.deepcopy(G).eval().requires_grad_(False)
for p in G2.parameters():
    p.zero_()
misc.copy_params_and_buffers(G, G2, require_all=True)
outputs = misc.print_module_summary(G2, [z, label])
"""


def run_script(network_pkl: object, outdir: Path, seed: int = 3) -> dict[str, Any]:
    """Run SCRIPT and return its variables."""
    outdir.mkdir(exist_ok=True)
    scope = {"network_pkl": str(network_pkl), "outdir": str(outdir), "seed": seed, "device": torch.device("cpu")}
    exec(SCRIPT, scope)
    return scope


def make_network(name: str, folder: Path, data: Path) -> Path:
    """Write a snapshot of a foreign project or of one of FAMILIES."""
    if name in FAMILIES:
        return make_snapshot(folder / f"{name}.pkl", data, name)
    G_ema = stylegan2_module() if name == "their-stylegan2" else styleformer_module()
    return write(folder / "network-snapshot-000100.pkl", {"G_ema": G_ema})


RESOLUTIONS = {
    "styleformer": [8, 16, 32],
    "stylegan2": [4, 8, 16, 32],
    "styleformer-c": [8, 16, 32],
    "their-stylegan2": [4, 8, 16],
    "their-styleformer": [8, 16, 32],
}


@pytest.mark.parametrize("name", RESOLUTIONS)
def test_a_script_for_stylegan2_ada_runs(
    name: str, shapes_zip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The image equals generate.py's, truncation follows the formula, and optimising w and noise lowers the loss."""
    network = make_network(name, tmp_path, shapes_zip)
    found = run_script(network, tmp_path / "script")
    G = found["G"]

    arguments = [f"--network={network}", "--seeds=3", "--trunc=0.7", f"--outdir={tmp_path / 'out'}", "--device=cpu"]
    assert CliRunner().invoke(generate.main, arguments).exit_code == 0
    images = [np.asarray(Image.open(tmp_path / folder / "seed0003.png")).astype(int) for folder in ("script", "out")]
    assert np.abs(images[0] - images[1]).max() <= 1
    assert images[0].std() > 5

    ws, w_avg, cut = (found[key].double() for key in ("ws", "w_avg", "cut"))
    torch.testing.assert_close(cut[:, :2], w_avg + 0.5 * (ws[:, :2] - w_avg), rtol=1e-5, atol=1e-5)
    assert torch.equal(cut[:, 2:], ws[:, 2:])
    assert w_avg.abs().max() > 0.1
    assert G.synthesis.block_resolutions == RESOLUTIONS[name]
    assert (G.img_channels, G.img_resolution, G.img_resolution) == G.img_shape
    assert len(found["noise_bufs"]) == sum(key.endswith("noise_const") for key in G.state_dict()) > 2
    assert found["losses"][-1] < found["losses"][0]
    assert all(buffer.grad.abs().sum() > 0 for buffer in found["noise_bufs"].values())

    assert all(torch.equal(x, y) for x, y in zip(G.parameters(), found["G2"].parameters(), strict=True))
    # Not to the bit: under the hooks of the summary, affine layers do not share a matrix product.
    torch.testing.assert_close(found["outputs"], G(found["z"], found["label"]), rtol=1e-4, atol=1e-5)
    assert f"{misc.count_parameters(G):,}" in capsys.readouterr().out.splitlines()[-2]


def test_snapshots_can_be_read_as_mappings(shapes_zip: Path, tmp_path: Path) -> None:
    snapshot = make_whole_snapshot(tmp_path / "whole.pkl", data="mine.zip", c_dim=2)
    with dnnlib.util.open_url(tmp_path / "whole.pkl") as f:
        data = legacy.load_network_pkl(f)
    for name in ("G", "D", "G_ema"):
        ours, theirs = getattr(snapshot, name).state_dict(), data[name].state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() | theirs.keys())
        assert data[name] is getattr(data, name)
        assert not data[name].training
    img = data.G_ema(torch.randn(2, data.G_ema.z_dim), torch.eye(2, dtype=torch.int64))
    assert data.D(img, torch.eye(2)).shape == (2, 1)
    assert (data.D.img_resolution, data.D.img_channels, data.D.c_dim) == (8, 3, 2)
    assert data["augment_pipe"] is None
    expected = {"path": "mine.zip", "use_labels": False, "max_size": None, "xflip": False}
    assert dict(data["training_set_kwargs"]) == {**expected, "random_seed": 0, "resolution": 8}

    assert make_snapshot(tmp_path / "alone.pkl", shapes_zip)
    with open(tmp_path / "alone.pkl", "rb") as f:
        alone = legacy.load_network_pkl(f)
    assert (alone.G, alone.D) == (None, None)
    dataset = training.dataset.ImageFolderDataset(**alone.training_set_kwargs | {"resolution": 16})
    assert dataset.image_shape == [3, 16, 16]

    theirs = write(tmp_path / "theirs.pkl", {"G_ema": stylegan2_module()})
    with open(theirs, "rb") as f:
        kwargs = legacy.load_network_pkl(f).training_set_kwargs
    assert (kwargs.path, kwargs.xflip, kwargs.resolution) == ("their.zip", True, 16)


def test_any_binary_file_object_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "network-snapshot-000100.pkl", {"G_ema": stylegan2_module()})
    content = path.read_bytes()
    with gzip.open(tmp_path / "net.pkl.gz", "wb") as packed:
        packed.write(content)
    with zipfile.ZipFile(tmp_path / "net.zip", "w") as archive:
        archive.writestr("folder/net.pkl", content)
    (tmp_path / "offset.bin").write_bytes(b"head" + content)
    expected = legacy.load_network(path).G_ema.state_dict()
    with (
        open(path, "rb") as plain,
        open(tmp_path / "offset.bin", "rb") as offset,
        gzip.open(tmp_path / "net.pkl.gz") as unpacked,
        zipfile.ZipFile(tmp_path / "net.zip") as archive,
        archive.open("folder/net.pkl") as member,
    ):
        offset.read(4)
        for f in (plain, plain, offset, unpacked, member, io.BytesIO(content)):
            found = legacy.load_network_pkl(f).G_ema.state_dict()  # type: ignore[arg-type]
            assert all(torch.equal(found[key], x) for key, x in expected.items())


def test_files_that_are_not_snapshots_are_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = dumps(Call(Name("os", "system"), (f"touch {tmp_path / 'run'}",)))
    (tmp_path / "bad.pkl").write_bytes(hostile)
    with (
        open(tmp_path / "bad.pkl", "rb") as f,
        pytest.raises(UserError, match=rf"^{tmp_path / 'bad.pkl'}: .*it refers to os.system"),
    ):
        legacy.load_network_pkl(f)
    with pytest.raises(UserError, match=r"^BytesIO: .*it refers to os.system"):
        legacy.load_network_pkl(io.BytesIO(hostile))
    named = io.BytesIO(b"text")
    monkeypatch.setattr(named, "name", "store/model.pkl", raising=False)
    with pytest.raises(UserError, match=r"^store/model.pkl: not a file of this project"):
        legacy.load_network_pkl(named)
    assert not (tmp_path / "run").exists()
    with pytest.raises(TypeError, match=r"'bad.pkl' is not a binary file object; open the file with dnnlib.util"):
        legacy.load_network_pkl("bad.pkl")  # type: ignore[arg-type]
    with open(tmp_path / "bad.pkl", encoding="latin-1") as text, pytest.raises(TypeError, match="not a binary file"):
        legacy.load_network_pkl(text)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^force_fp16=True: .*execution.using\(reduced=torch.float16\)"):
        legacy.load_network_pkl(io.BytesIO(hostile), force_fp16=True)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    with Site() as site:
        yield site


def test_open_url_opens_paths_and_urls(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "a file.bin"
    path.write_bytes(b"content")
    site.files["/file.bin"] = b"from the web"
    for name, content in ((path, b"content"), (str(path), b"content"), (path.as_uri(), b"content")):
        with dnnlib.util.open_url(name) as f:
            assert f.read() == content
            assert f.name == str(path)
    for _ in range(2):
        with dnnlib.util.open_url(f"{site.url}/file.bin") as f:
            assert f.read() == b"from the web"
    assert len(site.requests) == 1
    with pytest.raises(UserError, match=r"/missing.bin: the server returned 404"):
        dnnlib.util.open_url(f"{site.url}/missing.bin")
    with pytest.raises(FileNotFoundError, match=r"'missing.bin'"):
        dnnlib.util.open_url("missing.bin")


def test_easy_dict_is_a_dict_with_attributes() -> None:
    d = dnnlib.EasyDict(a=1)
    d.b = 2
    d["c"] = 3
    assert d == {"a": 1, "b": 2, "c": 3}
    assert (d.a, d.c) == (1, 3)
    del d.a
    assert "a" not in d
    assert hasattr(d, "b")
    with pytest.raises(AttributeError, match="no item 'a'; the items are 'b', 'c'"):
        d.a  # noqa: B018
    with pytest.raises(AttributeError, match="no item 'a'"):
        del d.a
    for other in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        assert (type(other), other) == (dnnlib.util.EasyDict, d)


@pytest.mark.parametrize("name", FAMILIES)
def test_force_fp32_computes_in_full_precision(name: str) -> None:
    G = build(FAMILIES[name])
    z = torch.randn(2, G.z_dim)
    plain = G(z, None)
    with execution.using(reduced=torch.bfloat16):
        assert not torch.equal(G(z, None), plain)
        assert torch.equal(G(z, None, force_fp32=True), plain)
        assert torch.equal(G.synthesis(G.mapping(z, None), force_fp32=True), plain)
        assert execution.current.reduced == torch.bfloat16
    for fused in (True, False):
        assert torch.equal(G(z, None, fused_modconv=fused), plain)
    with pytest.raises(TypeError, match="unexpected keyword argument 'update_emas'"):
        G(z, None, update_emas=True)
    with pytest.raises(ValueError, match="noise_mode='fixed' is not one of const, random, none"):
        G.synthesis(G.mapping(z, None), noise_mode="fixed")


def test_latents_and_labels_may_have_any_dtype() -> None:
    G = StyleGAN2Config(z_dim=8, w_dim=8, c_dim=3, resolutions=2, channel_base=32).build()
    z = torch.randn(3, 8)
    expected = G(z, torch.eye(3))
    assert torch.equal(G(z.double(), torch.eye(3).long()), expected)
    assert torch.equal(G.double()(z, torch.eye(3)), G(z.double(), torch.eye(3).double()))
    assert G(z, torch.eye(3)).dtype == torch.float64


def test_rectangular_images_have_no_single_resolution(tmp_path: Path) -> None:
    G: Generator = StyleformerConfig(z_dim=8, w_dim=8, base=(8, 12), widths=(8,), layers=(1,), depth=4).build()
    D = StyleGAN2DiscriminatorConfig(img_size=(8, 12), channel_base=64).build()
    Image.new("RGB", (12, 8)).save(tmp_path / "0.png")
    dataset = training.dataset.ImageFolderDataset(tmp_path)
    for owner, name in ((G, "img_resolution"), (G.synthesis, "img_resolution"), (D, "img_resolution")):
        with pytest.raises(ValueError, match=r"images of 8x12 .* have no single resolution; use img_shape"):
            getattr(owner, name)
    with pytest.raises(ValueError, match="images of 8x12"):
        dataset.resolution  # noqa: B018
    assert (G.img_channels, D.img_channels, dataset.num_channels) == (3, 3, 3)
    assert G.synthesis.block_resolutions == [12]


def test_parameters_and_buffers_are_copied_by_name() -> None:
    src: Any = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    dst: Any = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    src[1].running_mean.add_(5)
    kept = dst[2].weight.clone()
    dst[0].requires_grad_(False)
    misc.copy_params_and_buffers(src, dst)
    assert torch.equal(dst[0].weight, src[0].weight)
    assert dst[1].running_mean.tolist() == [5, 5, 5]
    assert torch.equal(dst[2].weight, kept)
    assert (dst[0].weight.requires_grad, src[0].weight.requires_grad) == (False, True)
    with pytest.raises(ValueError, match=r"^2.bias, 2.weight: missing in the source; pass require_all=False"):
        misc.copy_params_and_buffers(src, dst, require_all=True)
    wide = nn.Sequential(nn.Linear(1, 3))
    with pytest.raises(ValueError, match=r"^0.weight: has shape \(3, 1\) in the source, \(3, 2\) in the dest"):
        misc.copy_params_and_buffers(wide, dst)
    assert torch.equal(dst[0].bias, src[0].bias)


def test_image_folder_dataset_returns_images_and_labels(tmp_path: Path) -> None:
    labels = []
    generator = np.random.RandomState(0)
    for index in range(6):
        name = f"{index % 2}/{index}.png"
        (tmp_path / str(index % 2)).mkdir(exist_ok=True)
        Image.fromarray(generator.randint(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / name)
        labels.append(f'["{name}", {2 * (index % 2)}]')
    (tmp_path / "dataset.json").write_text('{"labels": [' + ", ".join(labels) + "]}")
    dataset: Any = training.dataset.ImageFolderDataset(
        path=str(tmp_path), resolution=16, max_size=4, use_labels=True, xflip=True
    )
    files = sorted(tmp_path.glob("*/*.png"))
    assert len(dataset) == 8
    chosen = {dataset.get_details(index).raw_idx for index in range(4)}
    assert len(chosen) == 4
    for index, (image, label) in enumerate(dataset):
        details = dataset.get_details(index)
        expected = np.asarray(Image.open(files[details.raw_idx])).transpose(2, 0, 1)
        assert np.array_equal(image, expected[:, :, ::-1] if index >= 4 else expected)
        assert (image.dtype, label.dtype) == (np.uint8, np.float32)
        assert details.xflip == (index >= 4)
        assert details.raw_label == 2 * int(files[details.raw_idx].parent.name)
        assert label.tolist() == dataset.get_label(index).tolist() == np.eye(3)[details.raw_label].tolist()
    assert (dataset.num_channels, dataset.resolution, dataset.label_dim) == (3, 16, 3)
    assert (dataset.image_shape, dataset.label_shape, dataset.name) == ([3, 16, 16], [3], tmp_path.name)
    assert (dataset.has_labels, dataset.has_onehot_labels) == (True, True)
    loader: Any = torch.utils.data.DataLoader(dataset, batch_size=8)
    images, one_hot = next(iter(loader))
    assert (images.shape, one_hot.shape) == ((8, 3, 16, 16), (8, 3))

    plain = training.dataset.ImageFolderDataset(tmp_path)
    assert (len(plain), plain.has_labels, plain[-1][1].shape) == (6, False, (0,))
    with pytest.raises(IndexError):
        plain[6]
    wrong: list[tuple[Any, str]] = [
        ({"resolution": 32}, "resolution=32: the images in .* are 16x16 RGB; .* --width=32"),
        ({"max_size": 0}, "max_size=0: must be at least 1; omit it to use all"),
        ({"random_seed": -1}, "random_seed=-1: must be at least 0"),
    ]
    for arguments, message in wrong:
        with pytest.raises(UserError, match=message):
            training.dataset.ImageFolderDataset(tmp_path, **arguments)


@pytest.mark.parametrize("name", ["/", "..", "a\0b", "x" * 300, "https://example.org/" + "y" * 300])
def test_the_name_of_a_file_object_is_not_interpreted(name: str) -> None:
    file = io.BytesIO(SHAPES)
    file.name = name
    assert legacy.load_network_pkl(file).G_ema.img_resolution == 32


def test_a_snapshot_can_be_read_from_a_pipe() -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as file, os.fdopen(write, "wb") as writer:

        def send() -> None:
            writer.write(SHAPES)
            writer.close()

        thread = Thread(target=send)
        thread.start()
        assert legacy.load_network_pkl(file).G_ema.img_resolution == 32
        thread.join()
