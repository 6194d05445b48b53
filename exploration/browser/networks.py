"""Snapshots of the browser page: those of a run's folder, loaded when they are chosen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dnnlib.config import UserError, family_of
from dnnlib.download import is_url
from exploration.attention_maps import has_attention
from exploration.directions import METHODS, Directions, max_components, read_directions, style_layers
from exploration.model import Model, read_styles
from exploration.opening import build_model, choose_label, open_network
from exploration.style_groups import format_ranges
from torch_utils.misc import count_parameters
from training.config import GENERATORS
from training.input_transform import can_rotate, can_shift
from training.snapshots.exchange import is_folder
from training.snapshots.snapshot import SNAPSHOT_NAME, list_snapshots

MAX_LOADED = 2  # snapshots in memory
MAX_SHOWN = 8  # directions of a method that the page offers
TITLES = {"sefa": "SeFa", "pca": "PCA"}


@dataclass(frozen=True, kw_only=True)
class Network:
    """A generator with its facts, saved styles (num_ws, w_dim) by name, and files of directions.

    The images of a conditional network have one of `num_classes` classes or, if that is 0, a label vector, by default
    that of the model.
    """

    path: str
    family: str
    model: Model
    kimg: float = 0.0
    num_classes: int = 0
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    files: Mapping[str, Directions] = field(default_factory=dict)

    @property
    def groups(self) -> Mapping[str, Sequence[int]]:
        """Style groups: indices by name."""
        groups: Mapping[str, Sequence[int]] = getattr(self.model.G, "style_groups", {})
        return groups

    @property
    def has_vectors(self) -> bool:
        """True if labels are vectors."""
        return self.model.G.c_dim > 0 and not self.num_classes

    def facts(self) -> dict[str, Any]:
        """Return what the page needs to know, as JSON."""
        G = self.model.G
        return {
            "path": self.path,
            "family": self.family,
            "kimg": self.kimg,
            "size": G.img_shape[1:],
            "parameters": count_parameters(G),
            "groups": {name: format_ranges(styles) for name, styles in self.groups.items()},
            "classes": self.num_classes,
            "label": numbers_of(self.model.c) if self.has_vectors else [],
            "attention": has_attention(G.synthesis),
            "shifts": can_shift(G),
            "rotates": can_rotate(G),
            "noise": any(name.endswith("noise_const") for name, _ in G.synthesis.named_buffers()),
            "saved": list(self.saved),
            "directions": [*self._methods(), *self._files()],
        }

    def _methods(self) -> list[dict[str, Any]]:
        G = self.model.G
        methods = [name for name in METHODS if name != "sefa" or any(style_layers(G.synthesis, G.num_ws, G.w_dim))]
        return [{"name": name, "title": TITLES[name], "count": self.num_directions(name)} for name in methods]

    def _files(self) -> list[dict[str, Any]]:
        return [
            {"name": name, "title": Path(name).name, "count": len(found.directions), "on": format_ranges(found.styles)}
            for name, found in self.files.items()
        ]

    def num_directions(self, name: str) -> int:
        """Return the number of directions of a method or file."""
        if name in self.files:
            return len(self.files[name].directions)
        return min(MAX_SHOWN, max_components(self.model, name, MAX_SHOWN + 1))


class Networks:
    """Networks by name, in the order of training. The last MAX_LOADED that were used stay in memory.

    `find` lists them; `refresh` adds those that training has written since. `default` is the newest at the start.
    """

    def __init__(self, find: Callable[[], Mapping[str, Callable[[], Network]]]) -> None:
        self.find = find
        self.loaders = dict(find())
        self.loaded: OrderedDict[str, Network] = OrderedDict()
        self.default = max(filter(SNAPSHOT_NAME.fullmatch, self.loaders), default=self.names[0])

    @property
    def names(self) -> list[str]:
        """Names of all networks."""
        return list(self.loaders)

    def refresh(self) -> None:
        """Add new networks. Those whose files were deleted remain in the list."""
        with suppress(UserError):
            found = {**self.loaders, **self.find()}
            self.loaders = {name: found[name] for name in sorted(found, key=order)}

    def open(self, name: str) -> Network:
        """Return a network, loaded if necessary. Raises UserError if its file cannot be used."""
        if name not in self.loaded:
            self.loaded[name] = self.loaders[name]()
        self.loaded.move_to_end(name)
        while len(self.loaded) > MAX_LOADED:
            self.loaded.popitem(last=False)
        return self.loaded[name]


def numbers_of(label: Tensor) -> tuple[float, ...]:
    """Return a float32 label (1, c_dim) as numbers with the fewest digits: 0.1, not 0.10000000149."""
    return tuple(float(str(number)) for number in label[0].cpu().numpy())


def find_networks(network: Path | str, load: Callable[[Path | str], Network]) -> Networks:
    """Return the snapshots of --network: of a run's folder all, the best ones last; of a file or URL only that one.

    Raises UserError for a folder without snapshots.
    """
    if is_url(network) or not Path(network).is_dir() or is_folder(Path(network)):
        return Networks(lambda: {Path(network).resolve().name: partial(load, network)})
    folder = Path(network)

    def find() -> dict[str, Callable[[], Network]]:
        paths = [*list_snapshots(folder), *folder.glob("network-best-*.pkl")]
        if not paths:
            raise UserError(f"--network={network}: neither a run (network-snapshot-*.pkl) nor a snapshot")
        return {path.name: partial(load, path) for path in sorted(paths, key=lambda path: order(path.name))}

    return Networks(find)


def order(name: str) -> tuple[bool, str]:
    """Return the sorting key of the file name of a snapshot: the best networks are last."""
    return not SNAPSHOT_NAME.fullmatch(name), name


def load(
    network: Path | str,
    *,
    label: tuple[float, ...] | None,
    batch: int,
    precision: str,
    device: str | None,
    ema: float | None,
    projected_w: Path | None,
    directions: Sequence[Path],
) -> Network:
    """Load a snapshot with the options of `generate.py play`. Raises UserError if one of the files does not fit."""
    snapshot, torch_device = open_network(network, device, ema)
    has_classes = label is None and snapshot.label_kind() != "vectors"  # requests then specify a class
    c = choose_label(snapshot, None, label, is_needed=not has_classes)
    snapshot = replace(snapshot, G=None, D=None)
    model = build_model(snapshot, torch_device, c, noise_mode="const", batch=batch, precision=precision, trunc=1.0)
    saved = () if projected_w is None else read_styles(projected_w, model.G)
    return Network(
        path=str(network),
        family=family_of(snapshot.config.generator, GENERATORS),
        model=model,
        kimg=snapshot.kimg,
        num_classes=model.G.c_dim if has_classes else 0,
        saved={f"proj{index:02d}": ws for index, ws in enumerate(saved)},
        files={str(path): read_directions(path, model.G, f"--directions={path}") for path in directions},
    )
