"""Images, attention maps and videos of the browser page. Images are generated in batches and cached."""

from __future__ import annotations

import base64
import io
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from exploration.attention_maps import BlockRecord, block_title, record
from exploration.browser.networks import Network
from exploration.browser.recipe import Edit, Morph, Recipe, Settings, Source
from exploration.directions import NUM_SAMPLES, Directions, apply_edits, find_directions
from exploration.model import Model
from exploration.morphing import StylesAt, Timing, render_frames, sweep_pose, through_seeds, through_styles
from exploration.style_groups import choose_styles
from exploration.video import MIN_FRAME, open_video
from torch_utils.sheets import MAX_TILE, marked, overlay, tile_of, to_rgb, upscale_factor

MAX_CACHE_BYTES = 2**30  # bytes of cached images


@dataclass(frozen=True, kw_only=True)
class View:
    """A network with the settings of a request, and its model with these settings."""

    network: Network
    settings: Settings
    model: Model


class ImageCache:
    """Images by key. The least recently used are dropped beyond `max_bytes`, but never those of the last request."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.images: OrderedDict[Hashable, Tensor] = OrderedDict()
        self.size = 0  # bytes

    def get(self, keys: Sequence[Hashable], make: Callable[[list[int]], Iterable[Tensor]]) -> list[Tensor]:
        """Return the images of `keys`. `make` generates those at the given positions, in one call."""
        missing = [keys.index(key) for key in dict.fromkeys(keys) if key not in self.images]
        if missing:
            for index, image in zip(missing, make(missing), strict=True):
                self.images[keys[index]] = image.clone()  # a view would retain the whole batch
                self.size += image.nbytes
        for key in keys:
            self.images.move_to_end(key)
        found = [self.images[key] for key in keys]
        while self.size > self.max_bytes and len(self.images) > len(set(keys)):
            self.size -= self.images.popitem(last=False)[1].nbytes
        return found


class Renderer:
    """Generator of images, with a cache of images, directions, and the attention of the last image."""

    def __init__(self) -> None:
        self.cache = ImageCache(MAX_CACHE_BYTES)
        self.directions: dict[Hashable, Directions] = {}
        self.records: tuple[Recipe, list[BlockRecord]] | None = None

    def images(self, view: View, recipes: Sequence[Recipe]) -> list[Tensor]:
        """Return uint8 images (C, H, W) of recipes that share mixed layers and edits."""
        return self.cache.get(
            recipes, lambda missing: view.model.images(self._styles(view, [recipes[index] for index in missing]))
        )

    def frames(self, view: View, morph: Morph, indices: Sequence[int]) -> list[Tensor]:
        """Return frames of a morph, uint8 (C, H, W)."""
        timing, path = self._path(view, morph)

        def make(missing: list[int]) -> Tensor:
            times = timing.times()[[indices[index] for index in missing]]
            return view.model.images(path(times)[:, 0], sweep_pose(view.model.pose, timing)(times))

        return self.cache.get([(morph, index) for index in indices], make)

    def video(self, view: View, morph: Morph, fps: int, suffix: str) -> bytes:
        """Return a morph as a file, equal to that of generate.py video."""
        timing, path = self._path(view, morph)
        scale = upscale_factor(view.model.G.img_shape[1:], MIN_FRAME)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"morph.{suffix}"
            with open_video(file, fps) as add:
                for frame in render_frames(view.model, path, timing, (1, 1), scale):
                    add(frame)
            return file.read_bytes()

    def attention(self, view: View, recipe: Recipe, x: int, y: int) -> dict[str, np.ndarray]:
        """Return the attention of pixel (x, y) in each block by title: averaged over heads, drawn over the image.

        The first entry is the image with the position.
        """
        if self.records is None or self.records[0] != recipe:
            self.records = recipe, record(view.model, self._styles(view, [recipe]))[0]
        height, width = view.model.G.img_shape[1:]
        image = tile_of(pixels_of(self.images(view, [recipe])[0]))
        maps = {"query position": marked(image, x, y, (height, width))}
        for number, block in enumerate(self.records[1]):
            rows = block.rows_of(torch.tensor([[x, y]], device=block.q.device), (height, width))
            weights = block.inside(block.maps(0, rows).mean(dim=0))[0].cpu().numpy()
            maps[block_title(number, block.grid)] = overlay(image, weights)
        return maps

    def _path(self, view: View, morph: Morph) -> tuple[Timing, StylesAt]:
        timing = Timing(num_keys=2, steps=morph.frames, loop=morph.loop)
        if morph.interpolation == "z":
            seeds = [int(end) for end in morph.ends]
            c = view.model.c.expand(2, -1)
            return timing, through_seeds(view.model, seeds, c, "z", timing, 1, view.settings.psi)
        found = self._sources(view, morph.ends)
        keys = torch.stack([found[end] for end in morph.ends])[None]  # (1, 2, num_ws, w_dim)
        return timing, through_styles(keys, "spline" if morph.interpolation == "spline" else "w", timing)

    def _styles(self, view: View, recipes: Sequence[Recipe]) -> Tensor:
        """Return the styles (n, num_ws, w_dim) of recipes that share mixed layers and edits."""
        others = [recipe.other for recipe in recipes if recipe.other is not None]
        found = self._sources(view, [*(recipe.source for recipe in recipes), *others])
        ws = torch.stack([found[recipe.source] for recipe in recipes])
        if others:
            mixed = list(recipes[0].styles)
            ws[:, mixed] = torch.stack([found[other] for other in others])[:, mixed]
        return apply_edits(ws, [(self._directions(view, edit), edit.index, edit.strength) for edit in recipes[0].edits])

    def _sources(self, view: View, sources: Iterable[Source]) -> dict[Source, Tensor]:
        """Return the styles (num_ws, w_dim) of seeds, mapped in one call, and of saved styles."""
        unique = list(dict.fromkeys(sources))
        seeds = [source for source in unique if isinstance(source, int)]
        device = view.model.device
        found: dict[Source, Tensor] = {
            name: view.network.saved[name].to(device) for name in unique if isinstance(name, str)
        }
        return found | (dict(zip(seeds, view.model.styles_of(seeds), strict=True)) if seeds else {})

    def _directions(self, view: View, edit: Edit) -> Directions:
        """Return the directions of an edit; those of sefa and pca depend on the label."""
        if edit.name in view.network.files:
            return view.network.files[edit.name]
        settings = view.settings
        key = (settings.network, settings.class_index, settings.label, edit.name, edit.layers)
        if key not in self.directions:
            styles = choose_styles(edit.layers, view.model.G.num_ws, view.network.groups)
            count = view.network.num_directions(edit.name)
            self.directions[key] = find_directions(view.model, edit.name, styles, count, NUM_SAMPLES)
        return self.directions[key]


def pixels_of(img: Tensor) -> np.ndarray:
    """Convert uint8 (C, H, W) to RGB (H, W, 3)."""
    return to_rgb(img.permute(1, 2, 0).numpy())


def image_uri(img: Tensor) -> str:
    """Encode uint8 (C, H, W) as a data URI, equal to the file of the image: grayscale, RGB or RGBA."""
    pixels = img.permute(1, 2, 0).numpy()
    return data_uri(pixels.squeeze(2) if len(img) == 1 else pixels)


def thumbnail_uri(img: Tensor) -> str:
    """Encode uint8 (C, H, W), reduced by an integer factor to at most MAX_TILE pixels, as a data URI."""
    return data_uri(tile_of(pixels_of(img), min_side=1, max_side=MAX_TILE))


def data_uri(pixels: np.ndarray) -> str:
    """Encode an image (H, W) or (H, W, 3 or 4) as a PNG data URI."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
