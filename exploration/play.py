"""Web page to explore a generator: seeds, truncation, mixing and attention. Served to browsers on this machine only."""

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
from exploration.attention_maps import BlockRecord, block_title, has_attention, record, tokens_of
from exploration.mixing import choose_styles, format_ranges, mix
from exploration.model import Model, label_of, seed_latents
from exploration.opening import build_model, choose_label, open_network
from torch_utils.sheets import marked, overlay, tile_of, to_rgb

HOST = "127.0.0.1"
PATHS = ("/images", "/attention")
MAX_IMAGES = 64  # per response
MAX_CACHE_BYTES = 2**30  # bytes of cached images; the cache always has room for one response
MAX_SEED = 2**32 - 1
MAX_PSI = 2.0
IDLE_TIMEOUT = 30.0  # seconds after which a connection without a request is closed
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
NAVIGATION = [["navigate"], ["document"]]  # Sec-Fetch-Mode and Sec-Fetch-Dest of a top-level navigation
HEADERS = {
    "Content-Security-Policy": f"{POLICY}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """A request for `count` images starting at `seed`, optionally mixed with the `styles` of the seed `other`."""

    seed: int
    count: int
    psi: float
    class_index: int | None
    other: int | None
    styles: tuple[int, ...]


class Player:
    """Request handler of the page. Images are generated in batches and cached.

    With `has_classes`, requests to a conditional network specify a class. Otherwise all images have the label of the
    model.
    """

    def __init__(self, model: Model, *, has_classes: bool = True) -> None:
        self.model = model
        self.num_classes = model.G.c_dim if has_classes else 0
        self.lock = Lock()  # the model serves one request at a time
        self.images: OrderedDict[Any, Tensor] = OrderedDict()
        self.max_images = max(MAX_IMAGES, MAX_CACHE_BYTES // math.prod(model.G.img_shape))
        self.records: tuple[Any, list[BlockRecord]] | None = None

    def page(self) -> str:
        """Return the HTML of the page, with a description of the model inserted."""
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
        """Return the response to a request for one of PATHS. Raises UserError for an invalid query."""
        given = read_query(query)
        with self.lock:
            return self._images(given) if path == "/images" else self._attention(given)

    def _images(self, given: dict[str, str]) -> Mapping[str, Any]:
        request = self._parse_request(given)
        return {"images": [data_uri(pixels_of(img)) for img in self._cached_images(request)]}

    def _attention(self, given: dict[str, str]) -> Mapping[str, Any]:
        """Return the maps of all blocks for the pixel (x, y), averaged over heads and drawn over the image."""
        height, width = self.model.G.img_shape[1:]
        x, y = take_int(given, "x", 0, width - 1), take_int(given, "y", 0, height - 1)
        request = self._parse_request(given)
        if request.count != 1:
            raise UserError("count: attention maps need a single image")
        if self.records is None or self.records[0] != request:
            self.records = request, record(self.model, self._styles(request, [request.seed]))[0]
        image = tile_of(pixels_of(self._cached_images(request)[0]))
        maps = [{"block": "query position", "image": data_uri(marked(image, x, y, (height, width)))}]
        for number, block in enumerate(self.records[1]):
            rows = tokens_of(torch.tensor([[x, y]], device=block.q.device), block.grid, (height, width))
            weights = block.maps(0, rows).mean(dim=0).unflatten(1, block.grid)[0].cpu().numpy()
            maps.append({"block": block_title(number, block.grid), "image": data_uri(overlay(image, weights))})
        return {"maps": maps}

    def _parse_request(self, given: dict[str, str]) -> ImageRequest:
        """Remove the parameters of an ImageRequest from `given`. Raises UserError for unknown parameters."""
        G = self.model.G
        count = take_int(given, "count", 1, MAX_IMAGES, default=1)
        other = take_int(given, "other", 0, MAX_SEED) if "other" in given else None
        if (other is None) != ("styles" not in given):
            raise UserError("other, styles: give both or neither")
        if "class" in given and not self.num_classes:
            raise UserError(f"class={given['class']}: this model has no classes to choose from")
        class_index = take_int(given, "class", 0, self.num_classes - 1) if self.num_classes else None
        request = ImageRequest(
            seed=take_int(given, "seed", 0, MAX_SEED - count + 1),
            count=count,
            psi=parse_psi(given.pop("trunc", "1")),
            class_index=class_index,
            other=other,
            styles=() if other is None else choose_styles(given.pop("styles"), G.num_ws, G.style_groups),
        )
        if given:
            raise UserError(f"{', '.join(given)}: unknown parameter of this request")
        return request

    def _cached_images(self, request: ImageRequest) -> list[Tensor]:
        """Return the images (C, H, W) of a request. Images that are not cached are generated in one call."""
        seeds = range(request.seed, request.seed + request.count)
        rest = (request.psi, request.class_index, request.other, request.styles)
        missing = [seed for seed in seeds if (seed, rest) not in self.images]
        if missing:
            for seed, img in zip(missing, self.model.images(self._styles(request, missing)), strict=True):
                self.images[seed, rest] = img.clone()  # a view would retain the whole batch
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
    """Parse a query string into a dict. Raises UserError for a malformed query or a repeated name."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=20, errors="strict")
    except ValueError as error:
        raise UserError(f"malformed query: {error}") from None
    given = dict(pairs)
    if len(given) < len(pairs):
        raise UserError("the query repeats a parameter")
    return given


def take_int(given: dict[str, str], name: str, low: int, high: int, default: int | None = None) -> int:
    """Remove a whole number from `given` and return it. Raises UserError if it is outside low..high."""
    text = given.pop(name, None)
    if text is None and default is not None:
        return default
    if text is None:
        raise UserError(f"{name}: is missing; must be a whole number from {low} to {high}")
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or not low <= int(text) <= high:
        raise UserError(f"{name}={text}: must be a whole number from {low} to {high}")
    return int(text)


def parse_psi(text: str) -> float:
    """Parse a truncation psi. Raises UserError for values outside -MAX_PSI..MAX_PSI."""
    try:
        psi = float(text)
    except ValueError:
        psi = math.nan
    if not abs(psi) <= MAX_PSI:
        raise UserError(f"trunc={text}: must be a number from {-MAX_PSI:g} to {MAX_PSI:g}")
    return psi


def pixels_of(img: Tensor) -> np.ndarray:
    """Convert uint8 (C, H, W) to RGB (H, W, 3)."""
    return to_rgb(img.permute(1, 2, 0).numpy())


def data_uri(pixels: np.ndarray) -> str:
    """Encode an image (H, W, 3) as a PNG data URI."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def refusal_of(headers: Message, path: str) -> str | None:
    """Return the reason for refusing a request, or None for requests from this page and navigation to it.

    Other sites can send a browser here through DNS rebinding, a form, an image or a script. A link to the page has no
    side effects and is allowed, as a top-level navigation.
    """
    hosts = headers.get_all("Host", [])
    host = hosts[0].lower() if len(hosts) == 1 else ""
    if not re.fullmatch(rf"({re.escape(HOST)}|localhost)(:[0-9]{{1,5}})?", host):
        return f"this page is served only as {HOST} or localhost"
    if path == "/" and [headers.get_all(f"Sec-Fetch-{name}") for name in ("Mode", "Dest")] == NAVIGATION:
        return None
    if any(site not in ("same-origin", "none") for site in headers.get_all("Sec-Fetch-Site", [])):
        return "requests from other sites are refused"
    if any(origin.lower() != f"http://{host}" for origin in headers.get_all("Origin", [])):
        return "requests from other sites are refused"
    return None


def open_server(player: Player, port: int) -> ThreadingHTTPServer:
    """Open a server on the loopback address; port 0 selects a free port. Raises UserError if it cannot listen."""

    class Handler(BaseHTTPRequestHandler):
        timeout = IDLE_TIMEOUT

        def do_GET(self) -> None:
            try:
                parts = urlsplit(self.path)
            except ValueError:
                return self._send(400, {"error": "malformed URL"})
            refusal = refusal_of(self.headers, parts.path)
            if refusal:
                return self._send(403, {"error": refusal})
            if parts.path in PATHS:
                return self._send(*self._answer(parts.path, parts.query))
            if parts.path == "/":
                return self._send(200, player.page())
            return self._send(404, {"error": "no such page"})

        def _answer(self, path: str, query: str) -> tuple[int, Mapping[str, Any]]:
            try:
                return 200, player.answer(path, query)
            except UserError as error:
                return 400, {"error": str(error)}
            except Exception as error:  # e.g. out of memory; the next request may succeed
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
            """Do not log requests."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Log errors, except those of a closed or silent connection."""
            if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
                super().handle_error(request, client_address)

    try:
        return Server((HOST, port), Handler)
    except OSError as error:
        raise UserError(f"--port={port}: cannot be used ({error.strerror}); choose another port") from None


def play(
    *,
    network: Path | str,
    label: tuple[float, ...] | None,
    batch: int,
    precision: str,
    device: str | None,
    port: int,
    ema: float | None = None,
) -> None:
    """Run `generate.py play`."""
    snapshot, torch_device = open_network(network, device, ema)
    has_classes = label is None and snapshot.label_kind() != "vectors"  # requests then specify a class
    c = choose_label(snapshot, None, label, is_needed=not has_classes)
    model = build_model(snapshot, torch_device, c, noise_mode="const", batch=batch, precision=precision, trunc=1.0)
    with open_server(Player(model, has_classes=has_classes), port) as server, suppress(KeyboardInterrupt):
        click.echo(f"Serving http://{HOST}:{server.server_port}/, Ctrl-C to stop")
        server.serve_forever()
