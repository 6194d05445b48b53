"""Writers of snapshots in the format of the public Styleformer release and of StyleGAN2-ADA-PyTorch.

The files follow a description of the format. The classes of those projects are not needed: the pickler writes class
names into the file. Torch and NumPy pickle tensors and numbers.
"""

from __future__ import annotations

import collections
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]

SOURCE = "raise SystemExit('the source in a snapshot was run')"


class Name:
    """Name in a pickle, e.g. os.system."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self, *_: Any) -> None:
        raise AssertionError("the pickler only writes names")


class Call:
    """Call of a name in a pickle, with the arguments, state (BUILD) and items of `__reduce__`."""

    def __init__(self, name: Name, arguments: tuple[Any, ...] = (), state: Any = None, items: Any = None) -> None:
        self.parts = (name, arguments, state, None, items)

    def __reduce__(self) -> Any:
        return self.parts


PYTHONS_PICKLER: Any = pickle._Pickler  # save cannot be overridden in the C pickler


class ForeignPickler(PYTHONS_PICKLER):
    """Pickler that also writes `Name`, and NumPy's core module under the name `numpy_core`."""

    numpy_core = "numpy._core"

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Name):
            self.write_name(obj.module, obj.name)
        else:
            super().save(obj, save_persistent_id)

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if getattr(obj, "__name__", "") == "scalar":
            self.write_name(f"{self.numpy_core}.multiarray", "scalar")
        else:
            super().save_global(obj, name)

    def write_name(self, module: str, name: str) -> None:
        if self.proto >= 4:
            self.save(module)
            self.save(name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())


def dumps(content: Any, protocol: int = 4, numpy_core: str = "numpy._core") -> bytes:
    """Pickle `content`."""
    file = io.BytesIO()
    pickler = ForeignPickler(file, protocol)
    pickler.numpy_core = numpy_core
    pickler.dump(content)
    return file.getvalue()


def easy_dict(**values: Any) -> Call:
    """dnnlib.util.EasyDict(values)."""
    return Call(Name("dnnlib.util", "EasyDict"), (), None, iter(values.items()))


def module(class_name: str, tensors: Tensors, frozen: tuple[str, ...] = (), **kwargs: Any) -> Call:
    """Return a network made with `kwargs`, from its tensors by dotted name; names in `frozen` become buffers."""
    buffers = ("w_avg", "noise_const", "resample_filter", "p", *frozen)
    own = {name: x for name, x in tensors.items() if "." not in name}
    below: dict[str, Tensors] = {}
    for name, x in tensors.items():
        head, _, rest = name.partition(".")
        if rest:
            below.setdefault(head, {})[rest] = x
    state = {
        "training": True,
        "_parameters": collections.OrderedDict(
            (name, None if x is None else nn.Parameter(x)) for name, x in own.items() if name not in buffers
        ),
        "_buffers": collections.OrderedDict((name, x) for name, x in own.items() if name in buffers),
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": collections.OrderedDict(),
        "_modules": collections.OrderedDict((name, module("Layer", part, frozen)) for name, part in below.items()),
        "act_gain": np.sqrt(2),
        "_init_args": (),
        "_init_kwargs": easy_dict(**kwargs),
    }
    meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": class_name, "state": state}
    return Call(Name("torch_utils.persistence", "_reconstruct_persistent_obj"), (meta,))


def write(path: Path, content: dict[str, Any], **options: Any) -> Path:
    """Write a snapshot of the networks in `content`."""
    data = {"training_set_kwargs": easy_dict(path="their.zip", xflip=True, resolution=np.int64(16)), "G": None}
    path.write_bytes(dumps({**data, "D": None, "augment_pipe": None, **content}, **options))
    return path


# Tensors of networks: published names and shapes, with non-trivial values.

FILTER = torch.tensor([1.0, 3.0, 3.0, 1.0]).outer(torch.tensor([1.0, 3.0, 3.0, 1.0])) / 64


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    """Return random tensors: style biases around 1, large equalised weights in the mapping network."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        if name.endswith("resample_filter"):
            x = FILTER.clone()
        elif ".fc" in name and "mapping" in name:
            x = 100 * x
        elif "affine" in name and name.endswith("bias"):
            x = 1 + 0.3 * x
        elif name.endswith("proj_weight"):
            x = x / shape[1] ** 0.5
        tensors[name] = x
    return tensors


def mapping_shapes(z_dim: int, c_dim: int, w_dim: int, layers: int, w_avg: bool = True) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a mapping network; the mapping network of D has no z and no w_avg."""
    shapes: dict[str, tuple[int, ...]] = {"mapping.w_avg": (w_dim,)} if w_avg else {}
    if c_dim:
        shapes |= {"mapping.embed.weight": (w_dim, c_dim), "mapping.embed.bias": (w_dim,)}
    for i in range(layers):
        inputs = z_dim + (w_dim if c_dim else 0) if i == 0 else w_dim
        shapes |= {f"mapping.fc{i}.weight": (w_dim, inputs), f"mapping.fc{i}.bias": (w_dim,)}
    return shapes


def styleformer_shapes(
    widths: tuple[int, ...], layers: tuple[int, ...], base: int, w_dim: int, channels: int, linformer: bool
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the synthesis network of a Styleformer."""
    shapes: dict[str, tuple[int, ...]] = {f"synthesis.b{base}_0.const": (base**2, widths[0])}
    for r, (width, count) in enumerate(zip(widths, layers, strict=True)):
        side = base << r
        shapes[f"synthesis.b{side}_0.pos_embedding"] = (1, side**2, width)
        for j in range(count):
            block = f"synthesis.b{side}_{j}"
            out = widths[min(r + 1, len(widths) - 1)] if j == count - 1 else width
            for name in "qkv":
                shapes[f"{block}.enc.{name}_weight"] = (width, width)
            shapes |= {f"{block}.enc.w_weight": (out, width), f"{block}.enc.u_weight": (out, width)}
            shapes |= {f"{block}.enc.affine1.weight": (2 * width, w_dim), f"{block}.enc.affine1.bias": (2 * width,)}
            shapes |= {f"{block}.enc.noise_strength": (), f"{block}.enc.noise_const": (side**2, 1)}
            shapes |= {f"{block}.enc.bias": (out,), f"{block}.resample_filter": (4, 4)}
            if linformer and side >= 32:
                shapes[f"{block}.enc.proj_weight"] = (256, side**2)
        shapes |= {f"{block}.torgb.weight": (channels, out), f"{block}.torgb.bias": (channels,)}
        shapes |= {f"{block}.torgb.affine.weight": (out, w_dim), f"{block}.torgb.affine.bias": (out,)}
    return shapes


def stylegan2_shapes(
    resolution: int, base: int, maximum: int, w_dim: int, channels: int, architecture: str
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the synthesis network of StyleGAN2."""
    shapes: dict[str, tuple[int, ...]] = {"synthesis.b4.const": (min(base // 4, maximum), 4, 4)}
    side, before = 4, 0
    while side <= resolution:
        block, width = f"synthesis.b{side}", min(base // side, maximum)
        shapes[f"{block}.resample_filter"] = (4, 4)
        for name, inputs in (("conv0", before), ("conv1", width)):
            if inputs:
                shapes |= {f"{block}.{name}.weight": (width, inputs, 3, 3), f"{block}.{name}.bias": (width,)}
                shapes |= {f"{block}.{name}.affine.weight": (inputs, w_dim), f"{block}.{name}.affine.bias": (inputs,)}
                shapes |= {f"{block}.{name}.noise_strength": (), f"{block}.{name}.noise_const": (side, side)}
                shapes[f"{block}.{name}.resample_filter"] = (4, 4)
        if architecture == "skip" or side == resolution:
            shapes |= {f"{block}.torgb.weight": (channels, width, 1, 1), f"{block}.torgb.bias": (channels,)}
            shapes |= {f"{block}.torgb.affine.weight": (width, w_dim), f"{block}.torgb.affine.bias": (width,)}
        if architecture == "resnet" and before:
            shapes |= {f"{block}.skip.weight": (width, before, 1, 1), f"{block}.skip.resample_filter": (4, 4)}
        side, before = 2 * side, width
    return shapes


def discriminator_shapes(
    resolution: int, base: int, maximum: int, channels: int, architecture: str, mbstd: bool, out: int = 1
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a discriminator without its mapping network."""
    shapes: dict[str, tuple[int, ...]] = {}
    side = resolution
    while side > 4:
        block, width, below = f"b{side}", min(base // side, maximum), min(base // (side // 2), maximum)
        shapes[f"{block}.resample_filter"] = (4, 4)
        if side == resolution or architecture == "skip":
            shapes |= {f"{block}.fromrgb.weight": (width, channels, 1, 1), f"{block}.fromrgb.bias": (width,)}
        shapes |= {f"{block}.conv0.weight": (width, width, 3, 3), f"{block}.conv0.bias": (width,)}
        shapes |= {f"{block}.conv1.weight": (below, width, 3, 3), f"{block}.conv1.bias": (below,)}
        shapes[f"{block}.conv1.resample_filter"] = (4, 4)
        if architecture == "resnet":
            shapes |= {f"{block}.skip.weight": (below, width, 1, 1)}
        side //= 2
    width = min(base // 4, maximum)
    if architecture == "skip":
        shapes |= {"b4.fromrgb.weight": (width, channels, 1, 1), "b4.fromrgb.bias": (width,)}
    shapes |= {"b4.conv.weight": (width, width + mbstd, 3, 3), "b4.conv.bias": (width,)}
    shapes |= {"b4.fc.weight": (width, 16 * width), "b4.fc.bias": (width,)}
    return shapes | {"b4.out.weight": (out, width), "b4.out.bias": (out,)}


# Complete files, with the keyword arguments written by the training loops of the projects.

Z, W, LAYERS = 5, 6, 2  # sizes of latents and styles, depth of the mapping
TRANSFORMS: dict[str, Any] = {
    **{"xflip": 1, "rotate90": 1, "xint": 1, "scale": 1, "rotate": 1, "aniso": 1, "xfrac": 1},
    **{"brightness": 1, "contrast": 1, "lumaflip": 1, "hue": 1, "saturation": 1},
}
SHAPES = {"z_dim": Z, "w_dim": W, "img_resolution": 16, "img_channels": 3}


def augmentation(p: float = 0.9, **more: Any) -> Call:
    """Return the bgc pipe."""
    return module("AugmentPipe", {"p": torch.tensor(p)}, **TRANSFORMS, **more)


def discriminator(c_dim: int = 0, **more: Any) -> Call:
    """Return a resnet discriminator for 16x16."""
    shapes = discriminator_shapes(16, 48, 8, 3, "resnet", True, 8 if c_dim else 1)
    if c_dim:
        shapes |= mapping_shapes(0, c_dim, 8, 8, w_avg=False)
    arguments: dict[str, Any] = {"c_dim": c_dim, "img_resolution": 16, "img_channels": 3}
    arguments |= {"channel_base": 48, "channel_max": 8}
    return module("Discriminator", draw(shapes, seed=7), **arguments, **more)


def styleformer(c_dim: int = 0, linformer: bool = False) -> tuple[Tensors, dict[str, Any]]:
    """Return tensors and arguments of a Styleformer: 8 and 6 channels, at 8 and 16 pixels or (linformer) 16 and 32.

    The published training loop writes these names, including sizes of convolutions that the network does not have.
    """
    shapes = mapping_shapes(Z, c_dim, W, LAYERS) | styleformer_shapes(
        (8, 6), (1, 2), 16 if linformer else 8, W, 3, linformer
    )
    tensors = draw(shapes)
    twice = {key.replace(".enc.proj", ".proj"): x for key, x in tensors.items() if key.endswith("proj_weight")}
    synthesis: dict[str, Any] = {"channel_base": 32768, "channel_max": 512, "num_fp16_res": 3, "conv_clamp": 256}
    synthesis |= {"depth": 4, "minimum_head": 1, "num_layers": [1, 2, 3], "G_dict": [8, 6, 4], "linformer": linformer}
    arguments: dict[str, Any] = {**SHAPES, "c_dim": c_dim, "img_resolution": 32 if linformer else 16}
    arguments |= {"mapping_kwargs": easy_dict(num_layers=LAYERS), "synthesis_kwargs": easy_dict(**synthesis)}
    return tensors | twice, arguments


def stylegan2(c_dim: int = 0, *, flat: bool = False) -> tuple[Tensors, dict[str, Any]]:
    """Return tensors and arguments of a StyleGAN2 generator for 16x16; StyleGAN3's repository has `flat` arguments."""
    tensors = draw(mapping_shapes(Z, c_dim, W, LAYERS) | stylegan2_shapes(16, 48, 5, W, 3, "skip"))
    arguments: dict[str, Any] = {**SHAPES, "c_dim": c_dim, "mapping_kwargs": easy_dict(num_layers=LAYERS)}
    widths = {"channel_base": 48, "channel_max": 5}
    if flat:
        return tensors, arguments | widths | {"fused_modconv_default": "inference_only"}
    return tensors, arguments | {"synthesis_kwargs": easy_dict(**widths, num_fp16_res=2, conv_clamp=256)}


def data_parallel(network: Call, wrapper: str = "data_parallel.DataParallel") -> Call:
    """Return a network wrapped in torch.nn.DataParallel or DistributedDataParallel, in pickled form."""
    place, _, name = wrapper.rpartition(".")
    state = {"_parameters": {}, "_buffers": {}, "_modules": {"module": network}, "device_ids": [0, 1], "dim": 0}
    return Call(Name(f"torch.nn.parallel.{place}", name), (), state)


STYLEGAN2_ARGUMENTS: dict[str, Any] = {
    **{"z_dim": Z, "c_dim": 0, "w_dim": W, "img_resolution": 16, "img_channels": 3},
    **{"mapping_kwargs": {"num_layers": LAYERS}, "synthesis_kwargs": {"channel_base": 48, "channel_max": 5}},
}


def stylegan2_module(c_dim: int = 0, img_channels: int = 3, **changes: Any) -> Any:
    """Return a small StyleGAN2 generator for 16x16."""
    shapes = mapping_shapes(Z, c_dim, W, LAYERS) | stylegan2_shapes(16, 48, 5, W, img_channels, "skip")
    kwargs = STYLEGAN2_ARGUMENTS | {"c_dim": c_dim, "img_channels": img_channels}
    return module("Generator", draw(shapes), **kwargs | changes)


STYLEFORMER_WIDTHS, STYLEFORMER_LAYERS = (32, 16, 16), (1, 1, 1)


def styleformer_module(c_dim: int = 0) -> Any:
    """Return a Styleformer for 32x32, pickled as in the public release."""
    shapes = mapping_shapes(64, c_dim, 64, 2) | styleformer_shapes(
        STYLEFORMER_WIDTHS, STYLEFORMER_LAYERS, 8, 64, 3, False
    )
    kwargs: dict[str, Any] = {"z_dim": 64, "c_dim": c_dim, "w_dim": 64, "img_resolution": 32, "img_channels": 3}
    synthesis = {"depth": 32, "num_layers": STYLEFORMER_LAYERS, "conv_clamp": 256, "linformer": 0}
    return module("Generator", draw(shapes), **kwargs, mapping_kwargs={"num_layers": 2}, synthesis_kwargs=synthesis)
