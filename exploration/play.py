"""A page to play with a generator: seeds, truncation, mixing and attention, for browsers on this machine alone."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import sys
import traceback
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dnnlib.config import UserError
from dnnlib.util import describe_error
from exploration.attention_maps import BlockRecord, has_attention, record, tokens_of
from exploration.mixing import choose_styles, format_ranges, mix
from exploration.model import Model, label_of, seed_latents
from exploration.opening import build_model, choose_label, open_network
from exploration.sheets import enlarged, marked, overlay, to_rgb

HOST = "127.0.0.1"
PATHS = ("/images", "/attention")
MAX_IMAGES = 64  # in one answer
MAX_KEPT = 2**30  # bytes of images, or one answer if that is more
MAX_SEED = 2**32 - 1
MAX_PSI = 2.0
SILENCE = 30.0  # seconds after which a connection without a request is closed
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
NAVIGATION = [["navigate"], ["document"]]  # the mode and the destination of a request for a whole window
HEADERS = {
    "Content-Security-Policy": f"{POLICY}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """The images of `count` seeds from `seed` on, each with some `styles` of the seed `other`, if one is given."""

    seed: int
    count: int
    psi: float
    class_index: int | None
    other: int | None
    styles: tuple[int, ...]


class Player:
    """Answers questions about a model. Images are made in batches, and kept for the next request.

    With `has_classes`, questions to a conditional network name a class; else all images have the model's label.
    """

    def __init__(self, model: Model, *, has_classes: bool = True) -> None:
        self.model = model
        self.num_classes = model.G.c_dim if has_classes else 0
        self.lock = Lock()  # a model computes for one request at a time
        self.images: OrderedDict[Any, Tensor] = OrderedDict()
        self.max_images = max(MAX_IMAGES, MAX_KEPT // math.prod(model.G.img_shape))
        self.records: tuple[Any, list[BlockRecord]] | None = None

    def page(self) -> str:
        """The page, with what it has to know of the model."""
        G = self.model.G
        facts = {
            "name": type(G).__name__,
            "size": G.img_shape[1:],
            "groups": {name: format_ranges(styles) for name, styles in G.style_groups.items()},
            "classes": self.num_classes,
            "attention": has_attention(G.synthesis),
        }
        page = Path(__file__).with_name("play.html").read_text(encoding="utf-8")
        return page.replace("__MODEL__", json.dumps(facts).replace("<", "\\u003c"))

    def answer(self, path: str, query: str) -> Mapping[str, Any]:
        """The answer to a request to one of PATHS. Raises UserError when it is not understood."""
        given = read_query(query)
        with self.lock:
            return self._images(given) if path == "/images" else self._attention(given)

    def _images(self, given: dict[str, str]) -> Mapping[str, Any]:
        request = self._parse_request(given)
        return {"images": [data_uri(pixels_of(img)) for img in self._made(request)]}

    def _attention(self, given: dict[str, str]) -> Mapping[str, Any]:
        """The maps of all blocks for the pixel x, y, averaged over heads, drawn over the image."""
        height, width = self.model.G.img_shape[1:]
        x, y = whole(given, "x", 0, width - 1), whole(given, "y", 0, height - 1)
        request = self._parse_request(given)
        if request.count != 1:
            raise UserError("count: attention is of one image")
        if self.records is None or self.records[0] != request:
            self.records = request, record(self.model, self._styles(request, [request.seed]))[0]
        picture = pixels_of(self._made(request)[0])
        image = enlarged(picture)
        maps = [{"block": "the position", "image": data_uri(marked(image, x, y, (height, width)))}]
        for block in self.records[1]:
            rows = tokens_of(torch.tensor([[x, y]], device=block.q.device), block.grid, (height, width))
            weights = block.maps(0, rows).mean(dim=0).unflatten(1, block.grid)[0].cpu().numpy()
            maps.append({"block": block.name, "image": data_uri(overlay(image, weights))})
        return {"maps": maps}

    def _parse_request(self, given: dict[str, str]) -> ImageRequest:
        """Take what all requests can say out of `given`. Raises UserError when something is left."""
        G = self.model.G
        count = whole(given, "count", 1, MAX_IMAGES, default=1)
        other = whole(given, "other", 0, MAX_SEED) if "other" in given else None
        if (other is None) != ("styles" not in given):
            raise UserError("other, styles: give both or none")
        if "class" in given and not self.num_classes:
            raise UserError(f"class={given['class']}: there are no classes to choose from")
        class_index = whole(given, "class", 0, self.num_classes - 1) if self.num_classes else None
        request = ImageRequest(
            seed=whole(given, "seed", 0, MAX_SEED - count + 1),
            count=count,
            psi=psi_of(given.pop("trunc", "1")),
            class_index=class_index,
            other=other,
            styles=() if other is None else choose_styles(given.pop("styles"), G.num_ws, G.style_groups),
        )
        if given:
            raise UserError(f"{', '.join(given)}: not understood here")
        return request

    def _made(self, request: ImageRequest) -> list[Tensor]:
        """Images (C, H, W), those that are not there yet made together."""
        seeds = range(request.seed, request.seed + request.count)
        rest = (request.psi, request.class_index, request.other, request.styles)
        missing = [seed for seed in seeds if (seed, rest) not in self.images]
        if missing:
            for seed, img in zip(missing, self.model.images(self._styles(request, missing)), strict=True):
                self.images[seed, rest] = img.clone()  # else it keeps all that were made with it
        for seed in seeds:
            self.images.move_to_end((seed, rest))
        found = [self.images[seed, rest] for seed in seeds]
        while len(self.images) > self.max_images:
            self.images.popitem(last=False)
        return found

    def _styles(self, request: ImageRequest, seeds: list[int]) -> Tensor:
        others = [] if request.other is None else [request.other]
        z = seed_latents([*seeds, *others], self.model.G.z_dim)
        c = self.model.c
        if request.class_index is not None:
            c = label_of(self.model.G.c_dim, request.class_index)
        c = c.to(self.model.device).expand(len(z), -1)
        ws = self.model.map(z, c, request.psi)  # (n, num_ws, w_dim)
        return mix(ws[: len(seeds)], ws[len(seeds) :], request.styles)[:, 0] if others else ws


def read_query(query: str) -> dict[str, str]:
    """Return the values of a query string by name. Raises UserError for what is none or names a value twice."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=20, errors="strict")
    except ValueError as error:
        raise UserError(f"the query is not one: {error}") from None
    given = dict(pairs)
    if len(given) < len(pairs):
        raise UserError("the query says something twice")
    return given


def whole(given: dict[str, str], name: str, low: int, high: int, default: int | None = None) -> int:
    """Take a whole number out of `given`. Raises UserError unless it is from low to high."""
    text = given.pop(name, None)
    if text is None and default is not None:
        return default
    if text is None:
        raise UserError(f"{name}: is missing, a whole number from {low} to {high}")
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or not low <= int(text) <= high:
        raise UserError(f"{name}={text}: must be a whole number from {low} to {high}")
    return int(text)


def psi_of(text: str) -> float:
    """Read a truncation psi. Raises UserError."""
    try:
        psi = float(text)
    except ValueError:
        psi = math.nan
    if not abs(psi) <= MAX_PSI:
        raise UserError(f"trunc={text}: must be a number from {-MAX_PSI:g} to {MAX_PSI:g}")
    return psi


def pixels_of(img: Tensor) -> np.ndarray:
    """uint8 (C, H, W) -> (H, W, 3)."""
    return to_rgb(img.permute(1, 2, 0).numpy())


def data_uri(pixels: np.ndarray) -> str:
    """A picture (H, W, 3) as PNG that a page can show."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def refusal_of(headers: Message, path: str) -> str | None:
    """Return why a request is not answered, None for one of this page itself, or of its user for the page.

    Other sites can lead a browser here, by a name of theirs, a form, a picture or a script. A link to the page, which
    does nothing, is followed, in a window of its own.
    """
    hosts = headers.get_all("Host", [])
    host = hosts[0].lower() if len(hosts) == 1 else ""
    if not re.fullmatch(rf"({re.escape(HOST)}|localhost)(:[0-9]{{1,5}})?", host):
        return f"this page is for {HOST} and localhost alone"
    if path == "/" and [headers.get_all(f"Sec-Fetch-{name}") for name in ("Mode", "Dest")] == NAVIGATION:
        return None
    if any(site not in ("same-origin", "none") for site in headers.get_all("Sec-Fetch-Site", [])):
        return "this page is for itself alone, and another site asks"
    if any(origin.lower() != f"http://{host}" for origin in headers.get_all("Origin", [])):
        return "this page is for itself alone, and another site asks"
    return None


def open_server(player: Player, port: int) -> ThreadingHTTPServer:
    """A server on this machine's own address; port 0 is any free one. Raises UserError when it cannot listen."""

    class Handler(BaseHTTPRequestHandler):
        timeout = SILENCE

        def do_GET(self) -> None:
            try:
                parts = urlsplit(self.path)
            except ValueError:
                return self._send(400, {"error": "the address is none"})
            refusal = refusal_of(self.headers, parts.path)
            if refusal:
                return self._send(403, {"error": refusal})
            if parts.path in PATHS:
                return self._send(*self._answer(parts.path, parts.query))
            if parts.path == "/":
                return self._send(200, player.page())
            return self._send(404, {"error": "there is no such page"})

        def _answer(self, path: str, query: str) -> tuple[int, Mapping[str, Any]]:
            try:
                return 200, player.answer(path, query)
            except UserError as error:
                return 400, {"error": str(error)}
            except Exception as error:  # e.g. too little memory for this request: the next one may be answered
                traceback.print_exc()
                return 500, {"error": describe_error(error)}

        def _send(self, status: int, content: str | Mapping[str, Any]) -> None:
            is_page = isinstance(content, str)
            body = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8" if is_page else "application/json")
            self.send_header("Content-Length", str(len(body)))
            for name, value in HEADERS.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are nothing to tell."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A browser that has gone away is nothing to tell; other errors are."""
            if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
                super().handle_error(request, client_address)

    try:
        return Server((HOST, port), Handler)
    except OSError as error:
        raise UserError(f"--port={port}: cannot be used ({error.strerror}); choose another one") from None


def play(
    *, network: Path | str, label: tuple[float, ...] | None, batch: int, precision: str, device: str | None, port: int
) -> None:
    """Run `generate.py play`."""
    snapshot, where = open_network(network, device)
    has_classes = label is None and snapshot.label_kind() != "vectors"  # and questions name theirs
    c = choose_label(snapshot, None, label, is_needed=not has_classes)
    model = build_model(snapshot, where, c, noise_mode="const", batch=batch, precision=precision, trunc=1.0)
    with open_server(Player(model, has_classes=has_classes), port) as server, suppress(KeyboardInterrupt):
        click.echo(f"http://{HOST}:{server.server_port}/ until Ctrl-C")
        server.serve_forever()
