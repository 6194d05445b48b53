"""Transfer learning: initialise networks from the tensors of a snapshot that fit.

Tensors are matched by function and not by index: the blocks of a grid are copied to the blocks of the same grid at
any image resolution. For this, a module may define `place`, which replaces its index in tensor names. If the
numbers of classes or image channels differ, the common part is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dnnlib.config import UserError, check_bounds, setting
from dnnlib.screen import public
from training.networks.mapping import ConcatenatingMapping

MIN_FITTING = 0.5  # minimum copied fraction of the matched parameters; below it, the configurations differ
MIN_COPIED = 0.1  # minimum copied fraction of all parameters; below it, the copy is useless


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Origin of the initial weights of a run; recorded, not set by the user. Secrets in a URL are removed."""

    source: str | None = setting(None, "Path or URL of the snapshot; None: random weights.")
    kimg: float = setting(0.0, "Training length of the snapshot, in thousands of images.")
    copied_g: float = setting(0.0, "Fraction of the parameters of G that were copied.", at_least=0, at_most=1)
    copied_d: float = setting(0.0, "Fraction of the parameters of D that were copied.", at_least=0, at_most=1)
    copied_g_ema: float = setting(0.0, "Fraction of the parameters of G_ema that were copied.", at_least=0, at_most=1)
    partial: tuple[str, ...] = setting((), "Names of the tensors that were copied in part.")
    new: tuple[str, ...] = setting((), "Names of the tensors that were not copied at all.")

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.source is not None:
            object.__setattr__(self, "source", public(self.source))


@dataclass(frozen=True, kw_only=True)
class Copied:
    """Result of `copy_weights`: the fraction of parameters that were copied, and the names of tensors by outcome."""

    share: float
    whole: tuple[str, ...]
    partial: tuple[str, ...]
    new: tuple[str, ...]

    def describe(self, name: str) -> list[str]:
        """Return lines for the log."""
        count = len(self.whole) + len(self.partial) + len(self.new)
        lines = [f"{name}: {len(self.whole)} of {count} tensors copied ({self.share:.1%} of the parameters)"]
        lines += [f"{name}: copied in part: {key}" for key in self.partial]
        return lines + [f"{name}: new: {key}" for key in self.new]


def places(network: nn.Module) -> dict[str, str]:
    """Return {tensor name: place}: the name, with the index of each module replaced by its `place`, if any."""
    paths = {"": ""}
    for path, module in network.named_modules(remove_duplicate=False):
        if path:
            parent, _, name = path.rpartition(".")
            paths[path] = f"{paths[parent]}{getattr(module, 'place', name)}."
    return {key: f"{paths[key.rpartition('.')[0]]}{key.rpartition('.')[2]}" for key in network.state_dict()}


@dataclass(frozen=True)
class Match:
    """Tensor of the target, the tensor of the source at the same place, and the part that can be copied, if any."""

    place: str
    old: Tensor
    new: Tensor
    gain: float  # gain of the source layer / gain of the target layer
    part: tuple[slice, ...] | None

    @property
    def count(self) -> int:
        """Return the number of elements that can be copied."""
        return 0 if self.part is None else self.new[self.part].numel()

    @property
    def is_whole(self) -> bool:
        """Return whether the whole tensor can be copied."""
        return self.part is not None and self.old.shape == self.new.shape

    def copy(self) -> None:
        """Copy the part, scaled by the ratio of the layers' gains."""
        assert self.part is not None
        self.new[self.part].copy_(self.old[self.part] * self.gain)


def copy_weights(source: nn.Module, target: nn.Module, name: str) -> Copied:
    """Copy to `target` all tensors of `source` that fit.

    Raises UserError and leaves the target unchanged if the style dimensions differ or if too little fits: less than
    MIN_FITTING of the matched parameters or less than MIN_COPIED of all parameters. Both limits exclude mapping
    networks, which nearly always fit.
    """
    matches = _match(source, target)
    sizes = {key: x.numel() for key, x in target.named_parameters()}
    copied = {key: match for key, match in matches.items() if match.part is not None}
    share = sum(match.count for key, match in copied.items() if key in sizes) / sum(sizes.values())
    _check_styles(source, target, name)
    _check_enough(matches, sizes, f"{name}: only {share:.0%} of the parameters are in the snapshot")
    with torch.no_grad():
        for match in copied.values():
            match.copy()
    here = places(target)
    return Copied(
        share=share,
        whole=tuple(match.place for match in copied.values() if match.is_whole),
        partial=tuple(match.place for match in copied.values() if not match.is_whole),
        new=tuple(place for key, place in here.items() if key not in copied),
    )


def _match(source: nn.Module, target: nn.Module) -> dict[str, Match]:
    """Return {tensor name: match} for the tensors of the target whose place exists in the source."""
    old, new = source.state_dict(), target.state_dict()
    source_keys = {place: key for key, place in places(source).items()}
    gains, own_gains = _gains(source), _gains(target)
    sizes = _adjustable_sizes(source, target)
    matches = {}
    for key, place in places(target).items():
        if source_key := source_keys.get(place):
            gain = gains.get(source_key, 1.0) / own_gains.get(key, 1.0)
            matches[key] = Match(place, old[source_key], new[key], gain, fit(old[source_key], new[key], sizes))
    return matches


def _check_styles(source: Any, target: Any, name: str) -> None:
    """Raise UserError if style dimensions differ: layers would fit, but their styles would be random."""
    source_dim, target_dim = (getattr(network, "w_dim", None) for network in (source, target))
    if source_dim == target_dim:
        return
    remedy = f"give --set generator.w_dim={source_dim}"
    if type(source.mapping).__name__ != type(target.mapping).__name__:
        remedy = f"its generator is a {type(source).__name__}, so give the --cfg and --gen of its run"
    elif isinstance(target.mapping, ConcatenatingMapping) and bool(source.c_dim) != bool(target.c_dim):
        remedy = f"they include the label embedding, so give --cond={'true' if source.c_dim else 'false'}"
    raise UserError(
        f"{name}: the snapshot has styles of {source_dim} numbers, this network has styles of {target_dim}: {remedy}"
    )


def _check_enough(matches: Mapping[str, Match], sizes: Mapping[str, int], problem: str) -> None:
    sizes = {key: size for key, size in sizes.items() if not key.startswith("mapping.")}
    shared = {key: match for key, match in matches.items() if key in sizes}
    fitting = sum(match.count for match in shared.values())
    if fitting >= max(MIN_FITTING * sum(sizes[key] for key in shared), MIN_COPIED * sum(sizes.values())):
        return
    misfit = next((match for match in shared.values() if match.part is None), None)
    example = ""
    if misfit:
        shapes = f"{tuple(misfit.old.shape)} in the snapshot and {tuple(misfit.new.shape)} in this network"
        example = f": {misfit.place} has shape {shapes}"
    raise UserError(f"{problem}; it was trained with another configuration{example}")


def fit(old: Tensor, new: Tensor, sizes: set[tuple[int, int]]) -> tuple[slice, ...] | None:
    """Return the part that can be copied; tensors may differ along one axis if `sizes` contains its two sizes."""
    if old.ndim != new.ndim:
        return None
    pairs = list(zip(old.shape, new.shape, strict=True))
    different = [pair for pair in pairs if pair[0] != pair[1]]
    if len(different) > 1 or not set(different) <= sizes:
        return None
    return tuple(slice(min(pair)) for pair in pairs)


def _adjustable_sizes(source: Any, target: Any) -> set[tuple[int, int]]:
    """Return the (source, target) sizes of axes that can be copied in part: channels, classes, mapping inputs."""
    pairs = {(source.img_shape[0], target.img_shape[0])}
    if source.c_dim and target.c_dim:
        pairs.add((source.c_dim, target.c_dim))
    elif hasattr(target, "z_dim"):
        pairs.add((_mapping_inputs(source), _mapping_inputs(target)))
    return pairs


def _mapping_inputs(G: Any) -> int:
    return int(G.z_dim + (G.w_dim if G.c_dim else 0))


def _gains(network: nn.Module) -> dict[str, float]:
    """Return {parameter name: runtime gain} of the layers with equalised or scaled learning rates."""
    gains = {}
    for path, module in network.named_modules():
        for name in ("weight", "bias"):
            if hasattr(module, f"{name}_gain"):
                gains[f"{path}.{name}"] = getattr(module, f"{name}_gain")
    return gains


def check_frozen(D: Any, count: int, copied: Copied) -> None:
    """Raise UserError if Freeze-D would freeze layers with random weights."""
    names = places(D)
    frozen = {id(x) for layer in D.layers_from_image()[:count] for x in layer.parameters()}
    whole = set(copied.whole)
    fresh = [names[key] for key, x in D.named_parameters() if id(x) in frozen and names[key] not in whole]
    if fresh:
        raise UserError(
            f"--freezed={count}: would freeze {', '.join(fresh[:3])}{' ...' * (len(fresh) > 3)} at random values, "
            "because the snapshot does not have them; omit --freezed, or use images like the snapshot's"
        )
