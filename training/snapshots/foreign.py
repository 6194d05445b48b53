"""Foreign snapshots: networks of this project built from the tensors and arguments in files of other projects.

Snapshots of the public Styleformer release, of StyleGAN2-ADA-PyTorch and of StyleGAN2 in StyleGAN3's repository are
pickles that contain the Python source of their networks and execute it when loaded. Here, torch_utils/pickles.py reads
tensors and arguments from such a file as plain data, and the networks built from them generate the same images. G_ema
is required: a file is refused, with the reason, if its G_ema has no counterpart in this project. Any other entry (G, D,
augmentation, dataset, entries of a fork) is skipped, with the reason, if it cannot be read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnnlib.config import FLOAT32_MAX, ConfigError, UserError, show
from torch_utils.pickles import PickledModule, Unreadable, is_pickle, read_pickle, why
from training.augment.pipe import AugmentConfig
from training.augment.stages import PIPES
from training.config import TrainConfig
from training.dataset import DatasetConfig
from training.networks.generator import GeneratorConfig
from training.networks.styleformer import StyleformerConfig
from training.networks.stylegan2 import StyleGAN2Config
from training.networks.stylegan2_discriminator import StyleGAN2DiscriminatorConfig
from training.snapshots.snapshot import outline

WHOLE_BATCH = 2**20  # minibatch-std group size that exceeds every batch size
PRESET = "foreign"  # preset name in the configuration of a foreign snapshot
KNOWN = ("G", "D", "G_ema", "augment_pipe", "training_set_kwargs", "cur_nimg")  # entries of a snapshot that are read
MAX_NAMED = 10  # maximum number of unknown entries listed by name
# Arguments of the synthesis network, which StyleGAN3's repository passes to the generator directly.
SYNTHESIS_ARGUMENTS = (
    "channel_base",
    "channel_max",
    "num_fp16_res",
    "conv_clamp",
    "fused_modconv_default",
    "architecture",
)

BLOCK = r"synthesis\.b([1-9][0-9]{0,4})_(0|[1-9][0-9]{0,2})\."  # encoder block of a Styleformer: resolution, index

Tensors = Mapping[str, Tensor]
Rename = Callable[[str], tuple[str, ...]]  # name in this project -> names in the file, to be concatenated


@dataclass(frozen=True, kw_only=True)
class ForeignSnapshot:
    """Converted snapshot of another project: a configuration, and renamed tensors by network.

    `left_out` maps the entries of the file that were not read to the reasons.
    """

    origin: str
    config: TrainConfig
    states: Mapping[str, dict[str, Tensor]]
    nimg: int
    ada_p: float
    left_out: Mapping[str, str]


def is_foreign(path: Path) -> bool:
    """Return whether a file is a pickle; this project's snapshots are not. Raises UserError for an HTML page."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if re.match(rb"\s*<(!doctype html|html)", start, re.IGNORECASE):
        raise UserError(f"{path}: an HTML page, not a snapshot; was it saved instead of the file?")
    return is_pickle(path)


def read_foreign(path: Path) -> ForeignSnapshot:
    """Read a snapshot of another project. Raises UserError naming the file and the cause."""
    content = read_pickle(path)
    try:
        return _interpret(content, path)
    except ConfigError as error:
        raise UserError(f"{path}: its networks cannot be built here ({_printable(error)})") from None
    except UserError as error:
        raise UserError(f"{path}: {_printable(error)}") from None


def _printable(text: object, length: int = 500) -> str:
    """Return a message or name, truncated to `length`, with unprintable characters escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text)[:length])


def _interpret(content: Any, path: Path) -> ForeignSnapshot:
    generator = _read_generator(_module(_entries(content), "G_ema"), "G_ema")
    left_out: dict[str, str] = {}

    def read_optional(name: str, read: Callable[[], Any], default: Any) -> Any:
        try:
            return read() if content.get(name) is not None else default
        except UserError as error:
            left_out[name] = _printable(error).removeprefix(f"{name}: ")
            return default

    def read_other_generator() -> ForeignNetwork:
        other = _read_generator(_module(content, "G"), "G")
        if other.config != generator.config:
            raise UserError("G and G_ema have different arguments")
        return other

    networks = {"G": read_optional("G", read_other_generator, None)}
    networks["D"] = read_optional("D", lambda: _read_discriminator(_module(content, "D"), generator), None)
    networks = {name: network for name, network in networks.items() if network} | {"G_ema": generator}
    augmentation = partial(_read_augment, content.get("augment_pipe"), generator.config)
    bound = _read_bound(content.get("augment_pipe"), generator.config)
    augment, p = read_optional("augment_pipe", augmentation, (AugmentConfig(mode="noaug", max_p=bound), 0.0))
    data = read_optional(
        "training_set_kwargs", lambda: _read_data(content["training_set_kwargs"], generator.config), None
    )
    values: dict[str, Any] = {"discriminator": StyleGAN2DiscriminatorConfig(**_domain(generator.config))}
    if D := networks.get("D"):
        values = {"discriminator": D.config, **D.values}
    config = TrainConfig(
        preset=PRESET,
        generator=generator.config,
        augment=augment,
        data=data or _read_data({}, generator.config),
        **generator.values | values,
    )
    return ForeignSnapshot(
        origin=generator.release.name,
        config=config,
        states={name: network.state for name, network in networks.items()},
        nimg=_read_nimg(content, path),
        ada_p=p,
        left_out=left_out | _unknown_entries(content),
    )


def _unknown_entries(content: Mapping[Any, Any]) -> dict[str, str]:
    """Return {entry: reason} for unknown entries; only the first MAX_NAMED are listed by name."""
    others = [name for name in content if name not in KNOWN]
    names = [
        _printable(name, 40) if isinstance(name, str) else "a key that is not a string" for name in others[:MAX_NAMED]
    ]
    if len(others) > MAX_NAMED:
        names.append(f"{len(others) - MAX_NAMED} more")
    return dict.fromkeys(names, "unknown")


def _entries(content: Any) -> dict[Any, Any]:
    """Return the entries of a snapshot by name. Raises UserError if the content is not a snapshot."""
    if isinstance(content, dict) and content.get("G_ema") is not None:
        return content
    first = content[0] if isinstance(content, (list, tuple)) and content else content
    reason = first.reason if isinstance(first, Unreadable) else "it contains no G_ema"
    raise UserError(f"not a snapshot of Styleformer, StyleGAN2-ADA or StyleGAN3 ({reason})")


def _module(content: Mapping[Any, Any], name: str) -> PickledModule:
    value = content[name]
    if not isinstance(value, PickledModule):
        raise UserError(f"{name} is not a network{why(value)}")
    return value.unwrapped()


def _read_nimg(content: Mapping[Any, Any], path: Path) -> int:
    """Return the number of images seen, from the file name or from the entry `cur_nimg` of some forks; else 0."""
    if kimg := re.fullmatch(r"network-snapshot-([0-9]{1,12})\.pkl", path.name):
        return 1000 * int(kimg[1])
    nimg = content.get("cur_nimg")
    return nimg if type(nimg) is int and 0 <= nimg < 2**53 else 0


def _domain(config: GeneratorConfig | StyleGAN2DiscriminatorConfig) -> dict[str, Any]:
    """Return the image and label dimensions of a network."""
    return {"img_channels": config.img_channels, "img_size": config.img_size, "c_dim": config.c_dim}


# ----------------------------------------------------------------------------------------------------------------------
# Arguments. Each known argument is removed once; the remaining arguments are unknown.


class Arguments:
    """Keyword arguments of a foreign network. Raises UserError for unsupported values and unknown names."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise UserError(f"{where} are not keyword arguments")
        self.values, self.where = dict(values), where

    def take(self, name: str, default: Any, is_valid: Callable[[Any], bool]) -> Any:
        """Remove and return an argument. Raises UserError if its value is not valid."""
        value = self.values.pop(name, default)
        if not _is_plain(value) or not is_valid(value):
            raise UserError(f"{self.where}: {name}={_show(value)} has no counterpart here")
        return value

    def integer(self, name: str, default: int | None = None, low: int = 1, high: int = 2**20) -> int:
        """Remove and return an integer, which is required if there is no default."""
        value: int = self.take(name, default, lambda x: type(x) is int and low <= x <= high)
        return value

    def clamp(self, default: float | None) -> float | None:
        """Remove and return conv_clamp."""
        value = self.take(
            "conv_clamp", default, lambda x: x is None or (type(x) in (int, float) and 0 < x <= FLOAT32_MAX)
        )
        return None if value is None else float(value)

    def require(self, name: str, *accepted: Any) -> None:
        """Remove an argument, which must be missing or have one of the accepted values."""
        self.take(name, accepted[0], lambda x: (list(x) if isinstance(x, tuple) else x) in accepted)

    def drop(self, *names: str) -> None:
        """Remove arguments that do not affect results."""
        for name in names:
            self.values.pop(name, None)

    def nested(self, name: str) -> Arguments:
        """Remove an argument that is a dict of arguments, and return its content."""
        return Arguments(self.values.pop(name, {}), f"{self.where}.{name}")

    def finish(self) -> None:
        """Raise UserError if any argument was not removed."""
        if self.values:
            raise UserError(f"{self.where}: unknown argument {', '.join(str(name)[:80] for name in self.values)}")


def _is_plain(value: Any) -> bool:
    """Return whether a value is a number, string, None, or a short list or dict of these."""
    if isinstance(value, (list, tuple, dict)):
        items = value.values() if isinstance(value, dict) else value
        return len(value) <= 100 and all(isinstance(x, (bool, int, float, str, type(None))) for x in items)
    return isinstance(value, (bool, int, float, str, type(None)))


def _show(value: Any) -> str:
    """Return a value as text if it is short and simple, else its type."""
    if isinstance(value, Unreadable):
        return f"({value.reason})"
    if isinstance(value, (list, tuple)) and all(isinstance(x, (int, float, type(None))) for x in value[:16]):
        return show(list(value[:16]))
    return show(value)[:80] if isinstance(value, (str, int, float, type(None))) else f"of type {type(value).__name__}"


def _arguments(module: PickledModule, name: str, positional: tuple[str, ...]) -> Arguments:
    given, named = module.state.get("_init_args", ()), module.state.get("_init_kwargs")
    if not isinstance(given, (list, tuple)) or len(given) > len(positional) or not isinstance(named, dict):
        raise UserError(f"{name}: has no recorded constructor arguments, or too many")
    return Arguments({**dict(zip(positional, given, strict=False)), **named}, name)


# ----------------------------------------------------------------------------------------------------------------------
# Networks


@dataclass(frozen=True, kw_only=True)
class CodeBase:
    """Code base that wrote a snapshot, and the defaults of its networks' arguments."""

    name: str
    conv_clamp: float | None = None
    num_fp16_res: int = 0
    w_avg_beta: float = 0.995


STYLEFORMER = CodeBase(name="Styleformer, public release")
STYLEGAN2_ADA = CodeBase(name="StyleGAN2-ADA, PyTorch")
STYLEGAN3 = CodeBase(name="StyleGAN2 of StyleGAN3's repository", conv_clamp=256.0, num_fp16_res=4, w_avg_beta=0.998)


@dataclass(frozen=True, kw_only=True)
class ForeignNetwork:
    """Converted network: configuration, renamed tensors, further fields of TrainConfig, and code base."""

    config: Any
    state: dict[str, Tensor]
    values: dict[str, Any]
    release: CodeBase


def _read_generator(module: PickledModule, name: str) -> ForeignNetwork:
    """Read a Styleformer or StyleGAN2 generator; both have the class name Generator."""
    tensors = _tensors(module)
    _refuse_stylegan3(module, tensors, name)
    if module.class_name != "Generator":
        raise UserError(f"{name} is of class {module.class_name}, expected Generator")
    arguments = _arguments(module, name, ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels"))
    is_styleformer = any(re.match(BLOCK, key) for key in tensors)
    is_flat = "synthesis_kwargs" not in arguments.values and not arguments.values.keys().isdisjoint(SYNTHESIS_ARGUMENTS)
    release = STYLEFORMER if is_styleformer else STYLEGAN3 if is_flat else STYLEGAN2_ADA

    shared = {name: arguments.integer(name) for name in ("z_dim", "w_dim", "img_channels")}
    shared["c_dim"] = arguments.integer("c_dim", low=0)
    resolution = arguments.integer("img_resolution", low=4, high=2**14)
    mapping = arguments.nested("mapping_kwargs")
    synthesis = arguments if is_flat else arguments.nested("synthesis_kwargs")
    synthesis.drop("fused_modconv_default")  # only the order of multiplications differs
    shared["mapping_layers"] = _read_mapping(mapping, shared["w_dim"])
    rate = mapping.take("w_avg_beta", release.w_avg_beta, lambda x: type(x) in (int, float) and 0 <= x <= 1)
    values = {"w_avg_rate": round(1 - rate, 12), **_read_precision(synthesis, resolution, release)}
    read = _read_styleformer if is_styleformer else _read_stylegan2
    clamp = synthesis.clamp(release.conv_clamp)
    config, rename = read(synthesis, tensors, resolution, {**shared, "conv_clamp": clamp})
    for part in (mapping, synthesis, arguments):
        part.finish()
    return ForeignNetwork(
        config=config, state=convert_state(config, tensors, rename, name), values=values, release=release
    )


def _tensors(module: PickledModule) -> Tensors:
    """Return the tensors of a network, without a name prefix added by DDP or torch.compile."""
    tensors = module.tensors()
    for prefix in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    return tensors


def _refuse_stylegan3(module: PickledModule, tensors: Tensors, name: str) -> None:
    if "synthesis.input.weight" not in tensors and not any(key.startswith("synthesis.L0_") for key in tensors):
        return
    arguments = module.state.get("_init_kwargs")
    given = arguments if isinstance(arguments, dict) else {}
    nested = given.get("synthesis_kwargs")
    is_radial = (nested if isinstance(nested, dict) else given).get("use_radial_filters") is True
    raise UserError(
        f"{name} is a StyleGAN3 generator, config {'r' if is_radial else 't'}, which is not supported: use "
        "StyleGAN3's own code; its networks trained with --cfg=stylegan2 are supported"
    )


def _read_mapping(arguments: Arguments, width: int, low: int = 1) -> int:
    """Remove the arguments of a mapping network; return its number of layers."""
    arguments.require("embed_features", None, width)
    count = arguments.integer("num_layers", 8, low=low, high=100)
    if count:
        arguments.require("layer_features", None, width)
        arguments.require("activation", "lrelu")
        arguments.require("lr_multiplier", 0.01)
    else:
        arguments.drop("layer_features", "activation", "lr_multiplier")
    return count


def _read_precision(arguments: Arguments, resolution: int, release: CodeBase) -> dict[str, Any]:
    """Return `precision` and `reduced_from`: float16 at the highest resolutions, but not below 8x8."""
    count = arguments.integer("num_fp16_res", release.num_fp16_res, low=0, high=16)
    arguments.drop("fp16_channels_last")  # memory layout only
    return {"precision": "fp16", "reduced_from": max(2 * resolution >> count, 8)} if count else {"precision": "fp32"}


def _read_stylegan2(
    synthesis: Arguments, tensors: Tensors, resolution: int, shared: dict[str, Any]
) -> tuple[StyleGAN2Config, Rename]:
    if resolution & (resolution - 1):
        raise UserError(f"StyleGAN2 supports images of 4, 8, 16, ... pixels, not of {resolution}")
    _read_layers(synthesis)
    synthesis.require("use_noise", True)
    config = StyleGAN2Config(
        **shared,
        base=(4, 4),
        resolutions=resolution.bit_length() - 2,
        architecture=synthesis.take("architecture", "skip", lambda x: x in ("orig", "skip", "resnet")),
        channel_base=synthesis.integer("channel_base", 32768, high=2**24),
        channel_max=synthesis.integer("channel_max", 512),
    )

    def rename(name: str) -> tuple[str, ...]:
        if name == "synthesis.const":
            return ("synthesis.b4.const",)
        if match := re.fullmatch(r"synthesis\.stages\.(\d+)\.(.+)", name):
            level, rest = int(match[1]), match[2]
            first = 1 if level == 0 else 0  # the lowest resolution has no conv0
            rest = re.sub(r"^convs\.(\d)", lambda conv: f"conv{int(conv[1]) + first}", rest)
            return (f"synthesis.b{4 << level}.{rest.replace('shortcut.', 'skip.')}",)
        return _rename_mapping(name)

    return config, rename


def _read_layers(arguments: Arguments) -> None:
    """Remove the arguments of convolutional layers that support only one value in this project."""
    arguments.require("kernel_size", 3)
    arguments.require("activation", "lrelu")
    arguments.require("resample_filter", [1, 3, 3, 1])
    arguments.drop("channels_last")


def _read_styleformer(
    synthesis: Arguments, tensors: Tensors, resolution: int, shared: dict[str, Any]
) -> tuple[StyleformerConfig, Rename]:
    """Derive widths and blocks from the tensors. Raises UserError for arguments that contradict them."""
    blocks: dict[int, set[int]] = {}
    for name in tensors:
        if match := re.match(BLOCK, name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    sides = sorted(blocks)
    if sides != [sides[0] << i for i in range(len(sides))] or sides[-1] != resolution or not sides[0]:
        raise UserError(f"encoder blocks at {', '.join(map(str, sides))} do not produce images of {resolution} pixels")
    widths = tuple(_rows(tensors, f"synthesis.b{side}_0.enc.q_weight") for side in sides)
    layers = tuple(len(blocks[side]) for side in sides)
    projections = [x for name, x in tensors.items() if re.fullmatch(BLOCK + r"enc\.proj_weight", name)]
    synthesis.drop("channel_base", "channel_max")  # passed by its training script, but unused
    _read_layers(synthesis)
    _check_counts(synthesis, ("g_dict", "G_dict"), widths)
    _check_counts(synthesis, ("num_layers",), layers)
    linformer = bool(synthesis.take("linformer", bool(projections), lambda x: x in (True, False)))
    config = StyleformerConfig(
        **shared,
        base=(sides[0], sides[0]),
        widths=widths,
        layers=layers,
        depth=synthesis.integer("depth", 32),
        minimum_head=synthesis.integer("minimum_head", 1),
        linformer=linformer,
        linformer_k=len(projections[0]) if projections and projections[0].ndim else 256,
    )

    def rename(name: str) -> tuple[str, ...]:
        if name == "synthesis.const":
            return (f"synthesis.b{sides[0]}_0.const",)
        if match := re.fullmatch(r"synthesis\.stages\.(\d+)\.pos_embedding", name):
            return (f"synthesis.b{sides[int(match[1])]}_0.pos_embedding",)
        if match := re.fullmatch(r"synthesis\.stages\.(\d+)\.(torgb\..+)", name):
            level = int(match[1])
            return (f"synthesis.b{sides[level]}_{layers[level] - 1}.{match[2]}",)
        if match := re.fullmatch(r"synthesis\.stages\.(\d+)\.blocks\.(\d+)\.(.+)", name):
            block = f"synthesis.b{sides[int(match[1])]}_{match[2]}.enc"
            return tuple(f"{block}.{rest}" for rest in _rename_encoder(match[3]))
        return _rename_mapping(name)

    return config, rename


def _rows(tensors: Tensors, name: str) -> int:
    if name not in tensors or tensors[name].ndim != 2:
        raise UserError(f"{name} is missing or not a matrix")
    return len(tensors[name])


def _check_counts(arguments: Arguments, names: tuple[str, ...], found: tuple[int, ...]) -> None:
    """Raise UserError if a per-resolution argument contradicts the tensors; the release ignores surplus values."""

    def is_valid(value: Any) -> bool:
        if isinstance(value, dict):
            value = list(value.values())
        return value is None or (isinstance(value, (list, tuple)) and tuple(value[: len(found)]) == found)

    for name in names:
        arguments.take(name, None, is_valid)


def _rename_encoder(name: str) -> tuple[str, ...]:
    if name == "qkv_weight":
        return "q_weight", "k_weight", "v_weight"
    theirs = {
        "affine.weight": "affine1.weight",
        "affine.bias": "affine1.bias",
        "out_weight": "w_weight",
        "residual_weight": "u_weight",
        "attention.token_projection": "proj_weight",
    }
    return (theirs.get(name, name),)


def _rename_mapping(name: str) -> tuple[str, ...]:
    return (re.sub(r"^mapping\.layers\.", "mapping.fc", name),)


def _read_discriminator(module: PickledModule, generator: ForeignNetwork) -> ForeignNetwork:
    """Read a discriminator, whose image and label dimensions must match the generator's."""
    if module.class_name != "Discriminator":
        raise UserError(f"D is of class {module.class_name}, expected Discriminator")
    arguments = _arguments(module, "D", ("c_dim", "img_resolution", "img_channels"))
    block, mapping, epilogue = (arguments.nested(f"{part}_kwargs") for part in ("block", "mapping", "epilogue"))
    c_dim = arguments.integer("c_dim", low=0)
    resolution = arguments.integer("img_resolution", low=4, high=2**14)
    cmap_dim = arguments.take("cmap_dim", None, lambda x: x is None or (type(x) is int and 0 <= x <= 2**20))
    if c_dim and cmap_dim == 0:
        raise UserError("D: cmap_dim=0 has no counterpart here: D would ignore the labels")
    mbstd_channels = epilogue.integer("mbstd_num_channels", 1, low=0, high=1)
    group = epilogue.take("mbstd_group_size", 4, lambda x: x is None or (type(x) is int and 1 <= x <= WHOLE_BATCH))
    config = StyleGAN2DiscriminatorConfig(
        img_channels=arguments.integer("img_channels"),
        img_size=(resolution, resolution),
        c_dim=c_dim,
        architecture=arguments.take("architecture", "resnet", lambda x: x in ("orig", "skip", "resnet")),
        channel_base=arguments.integer("channel_base", 32768, high=2**24),
        channel_max=arguments.integer("channel_max", 512),
        cmap_dim=cmap_dim if c_dim else None,
        mbstd_group_size=(WHOLE_BATCH if group is None else group) * mbstd_channels,
        conv_clamp=arguments.clamp(generator.release.conv_clamp),
    )
    if _domain(config) != _domain(generator.config):
        raise UserError("G and D have different image or label dimensions")
    smallest = config.grids[-1]
    if c_dim:
        width = config.cmap_dim or config.num_channels(smallest)
        config = replace(config, mapping_layers=_read_mapping(mapping, width, low=0))
        mapping.drop("w_avg_beta")
        mapping.finish()  # without labels there is no mapping network, so its arguments are ignored
    _read_precision(arguments, resolution, generator.release)
    block.drop("fp16_channels_last")
    _read_layers(block)
    epilogue.require("activation", "lrelu")
    values = {"freeze_layers": block.integer("freeze_layers", 0, low=0)}
    for part in (block, epilogue, arguments):
        part.finish()

    def rename(name: str) -> tuple[str, ...]:
        name = re.sub(r"^epilogue\.", f"b{smallest[0]}.", name)
        name = re.sub(r"^fromrgb\.(\d+)", lambda match: f"b{config.grids[int(match[1])][0]}.fromrgb", name)
        name = re.sub(r"^blocks\.(\d+)", lambda match: f"b{config.grids[int(match[1])][0]}", name)
        return _rename_mapping(name)

    state = convert_state(config, _tensors(module), rename, "D")
    return ForeignNetwork(config=config, state=state, values=values, release=generator.release)


def convert_state(config: Any, tensors: Tensors, rename: Rename, name: str) -> dict[str, Tensor]:
    """Return the state_dict of the network of `config`. Raises UserError for missing, misshapen or surplus tensors."""
    expected = outline(config, name).state_dict()
    used = {theirs for key in expected for theirs in rename(key)}
    _check_distinct(tensors, used, name)
    state = {key: _assemble(tensors, rename(key), target, name) for key, target in expected.items()}
    for key, tensor in tensors.items():
        if key not in used and not _is_redundant(key, tensor, tensors):
            raise UserError(f"{name}: {key} does not exist in the network that its arguments describe")
    return state


def _check_distinct(tensors: Tensors, names: set[str], network: str) -> None:
    """Raise UserError if one tensor has several names, because a small file could then describe a huge network."""
    first: dict[int, str] = {}
    for name in sorted(names & tensors.keys()):
        other = first.setdefault(id(tensors[name]), name)
        if other != name:
            raise UserError(f"{network}: {other} and {name} are the same tensor")


def _assemble(tensors: Tensors, names: tuple[str, ...], target: Tensor, network: str) -> Tensor:
    for name in names:
        if name not in tensors:
            raise UserError(f"{network}: {name} is missing")
        if not tensors[name].is_floating_point():
            raise UserError(f"{network}: {name} is not a floating-point tensor")
    shape = list(target.shape)
    if len(names) > 1:
        shape[0] //= len(names)
    for name in names:
        if _squeezed(tensors[name].shape) != _squeezed(shape):
            found = tuple(tensors[name].shape)
            raise UserError(f"{network}: {name} has shape {found}, but its arguments require {tuple(shape)}")
    parts = [tensors[name].reshape(shape).to(torch.float32) for name in names]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _squeezed(shape: Sequence[int]) -> list[int]:
    """Return a shape without dimensions of size 1: some weights are (3, C, 1, 1) in other projects and (3, C) here."""
    return [size for size in shape if size != 1]


def _is_redundant(key: str, tensor: Tensor, tensors: Tensors) -> bool:
    """Return whether a surplus tensor is redundant: the standard resampling filter, a projection stored twice."""
    if key.rpartition(".")[2] == "resample_filter":
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        expected = taps.outer(taps) if tensor.ndim == 2 else taps
        return tensor.shape == expected.shape and torch.allclose(tensor.float(), expected, atol=1e-6)
    if match := re.fullmatch(BLOCK + "proj_weight", key):
        projection = tensors.get(f"synthesis.b{match[1]}_{match[2]}.enc.proj_weight")
        return projection is not None and torch.equal(projection, tensor)
    return False


# ----------------------------------------------------------------------------------------------------------------------
# Augmentation and data

TRANSFORMS: Mapping[str, tuple[str, ...]] = {  # augmentation group -> names of the strengths of its transforms
    "blit": ("xflip", "rotate90", "xint"),
    "geom": ("scale", "rotate", "aniso", "xfrac"),
    "color": ("brightness", "contrast", "lumaflip", "hue", "saturation"),
    "filter": ("imgfilter",),
    "noise": ("noise",),
    "cutout": ("cutout",),
}
MAGNITUDES: Mapping[str, Any] = {  # published magnitudes of transforms; no others are supported
    "xint_max": 0.125,
    "scale_std": 0.2,
    "rotate_max": 1,
    "aniso_std": 0.2,
    "xfrac_std": 0.125,
    "brightness_std": 0.2,
    "contrast_std": 0.5,
    "hue_max": 1,
    "saturation_std": 1,
    "imgfilter_bands": [1, 1, 1, 1],
    "imgfilter_std": 1,
    "noise_std": 0.1,
    "cutout_size": 0.5,
}


def _read_augment(module: Any, generator: GeneratorConfig) -> tuple[AugmentConfig, float]:
    """Return the augmentation and p, limited to the bound that applied in training."""
    if not isinstance(module, PickledModule):
        raise UserError(f"not a module{why(module)}")
    if module.class_name != "AugmentPipe":
        raise UserError(f"augment_pipe is of class {module.class_name}, expected AugmentPipe")
    arguments = _arguments(module, "augment_pipe", ())
    groups = []
    for group, names in TRANSFORMS.items():
        strengths = {arguments.take(name, 0, lambda x: x in (0, 1)) for name in names}
        if len(strengths) > 1:
            raise UserError(f"augment_pipe: some of {', '.join(names)} are on and others off, which is not supported")
        groups += [group] if 1 in strengths else []
    for name, magnitude in MAGNITUDES.items():
        arguments.require(name, magnitude)
    arguments.take("aug_linformer", None, lambda x: x in (True, False, None))
    arguments.finish()
    if not groups:
        return AugmentConfig(mode="noaug"), 0.0
    pipe = next((name for name, members in PIPES.items() if members == tuple(groups)), None)
    if pipe is None:
        raise UserError(f"augment_pipe: {', '.join(groups)} together match none of {', '.join(PIPES)}")
    max_p = _read_bound(module, generator)
    p = module.tensors().get("p", torch.zeros([]))
    if p.numel() != 1 or not 0 <= p.item() < math.inf:
        raise UserError("augment_pipe: p is not a probability")
    return AugmentConfig(pipe=pipe, max_p=max_p), min(p.item(), max_p)


def _read_bound(module: Any, generator: GeneratorConfig) -> float:
    """Return the upper bound of p, which the public Styleformer release sets to 0.7 with Linformer; 1: no bound."""
    given = module.state.get("_init_kwargs") if isinstance(module, PickledModule) else None
    default = module is not None and getattr(generator, "linformer", False)
    return 0.7 if (given if isinstance(given, dict) else {}).get("aug_linformer", default) is True else 1.0


def _read_data(arguments: Any, generator: GeneratorConfig) -> DatasetConfig:
    """Return the dataset configuration, as far as the arguments determine it."""
    if not isinstance(arguments, dict):
        raise UserError(f"not keyword arguments{why(arguments)}")
    path = arguments.get("path")
    return DatasetConfig(
        path=path if isinstance(path, str) and path.isprintable() and len(path) < 1000 else "",
        use_labels=generator.c_dim > 0,
        mirror=arguments.get("xflip") is True,
    )
