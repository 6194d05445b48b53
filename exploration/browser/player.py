"""Answers to the requests of the browser page."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from dnnlib.config import UserError
from exploration.browser.networks import Networks, numbers_of
from exploration.browser.query import MAX_IMAGES, MAX_SEED, Query, parse_integer, parse_number, parse_sources
from exploration.browser.recipe import CommandLine, Edit, Morph, Recipe, Settings
from exploration.browser.rendering import Renderer, View, data_uri, image_uri, thumbnail_uri
from exploration.browser.server import Answer, File
from exploration.directions import METHODS
from exploration.model import label_of, vector_label
from exploration.pose import MAX_SHIFT, Pose
from exploration.style_groups import choose_styles
from exploration.video import check_encoder
from training.input_transform import can_rotate, can_shift

MAX_PSI = 2.0
MAX_STRENGTH = 20.0
MAX_LABEL = 1e6
MAX_ROTATION = 180.0  # degrees
MAX_FRAMES = 240  # of a morph, in one direction
MAX_FPS = 50
NOISE_MODES = ("const", "none")  # so that an image is a function of its styles
ABSENT = {  # parameter -> reason why a network does not have it
    "class": "this network has no classes to choose from",
    "label": "this network has no label vectors to choose from",
    "right": "this network has no Fourier features at its input, so its images cannot be moved",
    "down": "this network has no Fourier features at its input, so its images cannot be moved",
    "rotate": "this network is not equivariant to rotation",
}
INTERPOLATIONS = ("w", "z", "spline")
MEDIA_TYPES = {"mp4": "video/mp4", "gif": "image/gif"}


class Player:
    """Content of the page: its HTML, and answers to its requests."""

    def __init__(self, networks: Networks, command: CommandLine | None = None) -> None:
        """Load the default network. Raises UserError if its file cannot be used."""
        self.networks = networks
        self.command = command or CommandLine()
        self.renderer = Renderer()
        self.lock = Lock()  # one request at a time
        self.facts = networks.open(networks.default).facts()
        self.answers: Mapping[str, Callable[[Query], Answer]] = {
            "/network": self._network,
            "/image": partial(self._images, limit=1),
            "/images": self._images,
            "/mixtures": self._mixtures,
            "/attention": self._attention,
            "/morph": self._morph,
            "/video": self._video,
        }
        self.paths = frozenset(self.answers)

    def page(self) -> str:
        """Return the HTML of the page, with its style, its script and a description of the network inserted."""
        with self.lock:
            self.networks.refresh()
        start = {
            "networks": self.networks.names,
            "name": self.networks.default,
            "facts": self.facts,
            "mp4": can_write_mp4(),
        }
        html, css, js = (
            Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
        )
        js = js.replace("__START__", json.dumps(start).replace("<", "\\u003c"))
        return html.replace("/*style*/", css).replace("/*script*/", js)

    def answer(self, path: str, query: str) -> Answer:
        """Return the response to a request for one of `paths`. Raises UserError for an invalid query."""
        parsed = Query(query)
        with self.lock:
            return self.answers[path](parsed)

    def _network(self, query: Query) -> Answer:
        name = query.choice("network", self.networks.names)
        query.end()
        return self.networks.open(name).facts()

    def _images(self, query: Query, limit: int = MAX_IMAGES) -> Answer:
        """Return the images `of` sources, mixed and edited, and the command for the first.

        A single image has its full size; several are thumbnails. Raises UserError for more than `limit` images.
        """
        view = self._view(query)
        recipes = self._recipes(view, query)
        query.end()
        if len(recipes) > limit:
            raise UserError(f"of: choose one image, not {len(recipes)}")
        command = self.command.image(view.network.path, recipes[0])
        images = self.renderer.images(view, recipes)
        uris = map(thumbnail_uri, images) if len(images) > 1 else [image_uri(images[0])]
        return {"images": list(uris), "command": command}

    def _mixtures(self, query: Query) -> Answer:
        """Return the images of rows and columns, and a row of mixtures for each row."""
        view = self._view(query)
        rows = parse_sources("rows", query.text("rows"), view.network.saved)
        cols = parse_sources("cols", query.text("cols"), ())
        styles, edits = self._styles(view, query), self._edits(view, query)
        query.end()
        if len(rows) * len(cols) > MAX_IMAGES:
            raise UserError(f"rows, cols: {len(rows)} x {len(cols)} mixtures are more than {MAX_IMAGES}")
        plain = [Recipe(settings=view.settings, source=source) for source in (*rows, *cols)]
        mixed = [
            Recipe(settings=view.settings, source=row, other=int(col), styles=styles, edits=edits)
            for row in rows
            for col in cols
        ]
        images = list(map(thumbnail_uri, self.renderer.images(view, plain)))
        mixtures = list(map(thumbnail_uri, self.renderer.images(view, mixed)))
        return {
            "rows": [{"source": row, "image": image} for row, image in zip(rows, images, strict=False)],
            "cols": [{"source": col, "image": image} for col, image in zip(cols, images[len(rows) :], strict=True)],
            "mixtures": [mixtures[start : start + len(cols)] for start in range(0, len(mixtures), len(cols))],
            "command": self.command.mixtures(view.network.path, rows, [int(col) for col in cols], mixed[0]),
        }

    def _attention(self, query: Query) -> Answer:
        """Return the attention maps of pixel (x, y)."""
        view = self._view(query)
        height, width = view.model.G.img_shape[1:]
        x, y = query.integer("x", 0, width - 1), query.integer("y", 0, height - 1)
        recipes = self._recipes(view, query)
        query.end()
        if len(recipes) != 1:
            raise UserError("of: attention maps need a single image")
        maps = self.renderer.attention(view, recipes[0], x, y)
        return {
            "maps": [{"title": title, "image": data_uri(pixels)} for title, pixels in maps.items()],
            "command": self.command.attention(view.network.path, recipes[0], x, y),
        }

    def _morph(self, query: Query) -> Answer:
        """Return `count` frames of a morph, starting at frame `start`; in a loop, only those on the way there."""
        view = self._view(query)
        morph, fps = self._parse_morph(view, query)
        start = query.integer("start", 0, morph.frames)
        count = query.integer("count", 1, min(MAX_IMAGES, morph.frames + 1 - start))
        query.end()
        images = self.renderer.frames(view, morph, range(start, start + count))
        return {
            "images": list(map(thumbnail_uri, images)),
            "command": self.command.morph(view.network.path, morph, fps),
        }

    def _video(self, query: Query) -> Answer:
        """Return a morph as a file."""
        view = self._view(query)
        morph, fps = self._parse_morph(view, query)
        suffix = query.choice("format", tuple(MEDIA_TYPES))
        query.end()
        return File(self.renderer.video(view, morph, fps, suffix), MEDIA_TYPES[suffix])

    def _view(self, query: Query) -> View:
        """Parse the settings of a request."""
        network = self.networks.open(query.choice("network", self.networks.names, self.networks.default))
        class_index, c = None, network.model.c
        if network.num_classes:
            class_index = query.integer("class", 0, network.num_classes - 1)
            c = label_of(network.model.G.c_dim, class_index)
        elif "label" in query and network.has_vectors:
            numbers = [parse_number("label", part, MAX_LABEL) for part in query.text("label").split(",")]
            c = vector_label(network.model.G.c_dim, numbers)
        pose = parse_pose(query, network.model.G)
        for name in ABSENT.keys() & query.given.keys():
            raise UserError(f"{name}={query.text(name)}: {ABSENT[name]}")
        settings = Settings(
            network=network.path,
            psi=query.number("trunc", MAX_PSI, 1.0),
            noise_mode=query.choice("noise", NOISE_MODES, "const"),
            class_index=class_index,
            label=numbers_of(c) if network.has_vectors else (),
            pose=pose,
        )
        model = replace(
            network.model,
            c=c.to(network.model.device),
            truncation_psi=settings.psi,
            noise_mode=settings.noise_mode,
            pose=pose,
        )
        return View(network=network, settings=settings, model=model)

    def _recipes(self, view: View, query: Query) -> list[Recipe]:
        """Parse the sources `of` a request, the seed to mix with, and the edits."""
        sources = parse_sources("of", query.text("of"), view.network.saved)
        if ("other" in query) != ("styles" in query):
            raise UserError("other, styles: give both or neither")
        other = query.integer("other", 0, MAX_SEED) if "other" in query else None
        styles = () if other is None else self._styles(view, query)
        edits = self._edits(view, query)
        return [
            Recipe(settings=view.settings, source=source, other=other, styles=styles, edits=edits) for source in sources
        ]

    def _styles(self, view: View, query: Query) -> tuple[int, ...]:
        styles = query.text("styles")
        return choose_styles(styles, view.model.G.num_ws, view.network.groups, f"styles={styles}")

    def _edits(self, view: View, query: Query) -> tuple[Edit, ...]:
        """Parse e.g. directions=sefa, layers=coarse, edit=0:1.5,3:-2."""
        if "edit" not in query:
            return ()
        name = query.choice("directions", (*METHODS, *view.network.files))
        layers = query.text("layers", "all")
        layers = layers if name in METHODS else "all"  # a file has its own
        choose_styles(layers, view.model.G.num_ws, view.network.groups, f"layers={layers}")
        edits, last = [], view.network.num_directions(name) - 1
        for part in query.text("edit").split(","):
            index, _, strength = part.partition(":")
            edits.append(
                Edit(
                    name=name,
                    layers=layers,
                    index=parse_integer("edit", index, 0, last),
                    strength=parse_number("edit", strength, MAX_STRENGTH),
                )
            )
        return tuple(edits)

    def _parse_morph(self, view: View, query: Query) -> tuple[Morph, int]:
        """Parse a morph and its frames per second."""
        ends = parse_sources("of", query.text("of"), view.network.saved)
        if len(ends) != 2:
            raise UserError(f"of: a morph has two ends, not {len(ends)}")
        morph = Morph(
            settings=view.settings,
            ends=(ends[0], ends[1]),
            frames=query.integer("frames", 1, MAX_FRAMES),
            interpolation=query.choice("interpolation", INTERPOLATIONS, "w"),
            loop=query.integer("loop", 0, 1, 1) == 1,
        )
        if morph.interpolation == "z" and any(isinstance(end, str) for end in ends):
            raise UserError("interpolation=z: saved styles have no z; choose w or spline")
        return morph, query.integer("fps", 1, MAX_FPS, 12)


def parse_pose(query: Query, G: Any) -> Pose:
    """Parse the pose of the images, as far as the network supports it."""
    if not can_shift(G):
        return Pose()
    x, y = (query.number(name, MAX_SHIFT, 0.0) for name in ("right", "down"))
    return Pose(x=x, y=y, degrees=query.number("rotate", MAX_ROTATION, 0.0) if can_rotate(G) else 0.0)


def can_write_mp4() -> bool:
    """Return whether an encoder for MP4 is installed."""
    try:
        check_encoder(Path("video.mp4"), 30)
    except UserError:
        return False
    return True
