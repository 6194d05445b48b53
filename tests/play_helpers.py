"""Pages of `generate.py play` for tests, served in a thread, and requests to them."""

from __future__ import annotations

import base64
import http.client
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlencode

import numpy as np
import torch
from conftest import PATIENCE
from PIL import Image

from exploration.browser.networks import Network, Networks, find_networks, load
from exploration.browser.player import Player
from exploration.browser.recipe import CommandLine
from exploration.browser.server import open_server
from exploration.model import Model


def player_of(model: Model, **facts: Any) -> Player:
    """Make the page of a model that is not in a file; `facts` are fields of its Network."""
    network = Network(path="n.pkl", family="styleformer", model=model, **facts)
    return Player(Networks(lambda: {"n.pkl": lambda: network}))


def page_of(folder: Path | str, **options: Any) -> Player:
    """Make the page of a snapshot or run, with options of `generate.py play`."""
    given: dict[str, Any] = {"label": None, "batch": 16, "precision": "fp32", "device": "cpu", "ema": None}
    given |= {"projected_w": None, "directions": (), **options}
    networks = find_networks(folder, lambda path: load(path, **given))
    return Player(networks, CommandLine(projected_w=given["projected_w"]))


@contextmanager
def served(player: Player) -> Iterator[int]:
    """Serve the page in a thread; return its port."""
    with open_server(player, 0) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def get(port: int, address: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", address, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def request_json(port: int, path: str, **query: Any) -> Any:
    status, body = get(port, f"/{path}?{urlencode(query)}")
    assert status == 200, body
    return json.loads(body)


def answer(player: Player, address: str) -> Any:
    """Return the answer to a request, without a server."""
    path, _, query = address.partition("?")
    return player.answer(f"/{path}", query)


def decoded(uri: str) -> np.ndarray:
    kind, data = uri.split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def as_pixels(img: torch.Tensor) -> np.ndarray:
    return img.permute(1, 2, 0).numpy()
