"""generate.py play: results equal those of the other commands; invalid requests are answered with status 400."""

from __future__ import annotations

import base64
import html
import http.client
import io
import json
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from conftest import PATIENCE
from exploration_helpers import TRANSGAN, build, make_model, make_snapshot, model_of, run, run_ok
from PIL import Image

from exploration.attention_maps import attention_maps, record
from exploration.mixing import mix
from exploration.model import Model, label_of, seed_latents
from exploration.play import MAX_SEED, Player, open_server
from torch_utils.sheets import overlay, tile_of
from training.networks.stylegan2 import StyleGAN2Config


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


def decoded(uri: str) -> np.ndarray:
    kind, data = uri.split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def as_pixels(img: torch.Tensor) -> np.ndarray:
    return img.permute(1, 2, 0).numpy()


def test_images_equal_those_of_the_commands() -> None:
    model = make_model(truncation_psi=0.7)
    ws = model.styles_of([4, 5, 6, 9])
    styles = model.G.style_groups["coarse"]
    plain, mixed = model.images(ws[:3]), model.images(mix(ws[:3], ws[3:], styles)[:, 0])
    with served(Player(make_model())) as port:
        found = request_json(port, "images", seed=4, count=3, trunc=0.7)["images"]
        also_mixed = request_json(port, "images", seed=4, count=3, trunc=0.7, other=9, styles="coarse")["images"]
    for uris, images in ((found, plain), (also_mixed, mixed)):
        assert len(uris) == 3
        for uri, img in zip(uris, images, strict=True):
            assert np.array_equal(decoded(uri), as_pixels(img))
    assert not torch.equal(plain, mixed)


def test_images_are_cached_and_generated_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exploration.play.MAX_IMAGES", 3)
    monkeypatch.setattr("exploration.play.MAX_CACHE_BYTES", 4 * 3 * 32 * 32)
    player, render = Player(make_model()), Model.images
    sizes: list[int] = []

    def counted(model: Model, ws: torch.Tensor) -> torch.Tensor:
        sizes.append(len(ws))
        return render(model, ws)

    monkeypatch.setattr(Model, "images", counted)
    for query in ("seed=0&count=3", "seed=0&count=3", "seed=1&count=3", "seed=1&count=3&trunc=0.5", "seed=0"):
        player.answer("/images", query)
    assert sizes == [3, 1, 3, 1]  # the oldest image was no longer cached
    assert len(player.images) == 4
    assert {img.untyped_storage().nbytes() for img in player.images.values()} == {3 * 32 * 32}


def test_the_request_selects_the_class() -> None:
    G = build(StyleGAN2Config(z_dim=16, w_dim=12, c_dim=3, resolutions=4, channel_base=64))
    model = Model(G=G, device=torch.device("cpu"), c=label_of(3, 2))
    expected = model.images(model.map(seed_latents([5], 16)))[0]
    with served(Player(model)) as port:
        assert np.array_equal(
            decoded(request_json(port, "images", **{"seed": 5, "class": 2})["images"][0]), as_pixels(expected)
        )
        for query in ("seed=5", "seed=5&class=3"):
            assert get(port, f"/images?{query}")[0] == 400
        status, body = get(port, "/attention?seed=5&class=1&x=0&y=0")
    assert (status, b"has no self-attention" in body) == (400, True)


def test_attention_maps_equal_those_of_the_command() -> None:
    model, size = make_model(), (32, 32)
    records, _ = record(model, model.styles_of([3]))
    computed = attention_maps(records, 0, torch.tensor([[7, 20]]), size)
    with served(Player(model)) as port:
        position, *found = request_json(port, "attention", seed=3, x=7, y=20)["maps"]
        moved = request_json(port, "attention", seed=4, x=7, y=20)["maps"]
        sheet = tile_of(decoded(request_json(port, "images", seed=3)["images"][0]))
    assert [one["block"] for one in found] == [*computed.titles().values()]
    for one, maps in zip(found, computed.maps.values(), strict=True):
        assert np.array_equal(decoded(one["image"]), overlay(sheet, maps.mean(axis=0)[0]))
    assert tuple(decoded(position["image"])[20 * 3 - 2, 7 * 3]) == (0, 255, 255)
    assert moved[1] != found[0]


NONSENSE = {
    "images": "seed: is missing",
    "images?": "seed: is missing",
    "images?seed": "malformed query: bad query field",
    "images?seed=": "seed=: must be a whole number from 0 to 4294967295",
    "images?seed=-1": "seed=-1: must be a whole number",
    "images?seed=1.5": "seed=1.5: must be a whole number",
    "images?seed=%D9%A3": "seed=٣: must be a whole number",
    "images?seed=%ff": "malformed query: 'utf-8' codec",
    "images?seed=" + "9" * 5000: "99: must be a whole number",
    f"images?seed={MAX_SEED}&count=2": "must be a whole number from 0 to 4294967294",
    "images?seed=0&count=0": "count=0: must be a whole number from 1 to 64",
    "images?seed=0&count=65": "count=65: must be a whole number from 1 to 64",
    "images?seed=0&seed=1": "the query repeats a parameter",
    "images?seed=0&trunc=nan": "trunc=nan: must be a number from -2 to 2",
    "images?seed=0&trunc=1e9": "trunc=1e9: must be a number",
    "images?seed=0&trunc=__import__": "trunc=__import__: must be a number",
    "images?seed=0&class=0": "class=0: this model has no classes to choose from",
    "images?seed=0&other=1": "other, styles: give both or neither",
    "images?seed=0&styles=all": "other, styles: give both or neither",
    "images?seed=0&other=1&styles=conv": "'conv' is not a style; choose from 0-4",
    "images?seed=0&other=1&styles=" + "9" * 5000: "99' is not a style",
    "images?seed=0&other=1&styles=..%2f..%2fetc": "'../../etc' is not a style",
    "images?seed=0&x=3": "x: unknown parameter",
    "images?" + "&".join(f"a{i}=1" for i in range(50)): "malformed query: Max number of fields exceeded",
    "attention?seed=0": "x: is missing",
    "attention?seed=0&x=32&y=0": "x=32: must be a whole number from 0 to 31",
    "attention?seed=0&x=0&y=-1": "y=-1: must be a whole number",
    "attention?seed=0&count=2&x=0&y=0": "count: attention maps need a single image",
}


def test_invalid_requests_are_answered_with_400() -> None:
    player = Player(make_model())
    with served(player) as port:
        for query, message in NONSENSE.items():
            status, body = get(port, f"/{query}")
            assert status == 400, query
            assert message in json.loads(body)["error"]
        assert get(port, "http://[", Host="localhost") == (400, b'{"error": "malformed URL"}')
        assert not player.images
        for path in ("images/", "../images", "favicon.ico", "exploration/play.py"):
            assert get(port, f"/{path}")[0] == 404
        assert get(port, "/", Host="elsewhere.example:80")[0] == 403
        assert get(port, "/", Host=f"localhost:{port}")[0] == 200


def request_raw(port: int, *lines: str) -> tuple[int, str]:
    """Send a request with these header lines; return the status and the full response."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        response = b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode("latin-1")
    return int(response.split()[1]), response


FOREIGN_HOSTS = [
    "elsewhere.example",
    "user@localhost",
    "u:p@127.0.0.1",
    "127.0.0.1:x@evil.example",
    "localhost:80@evil",
]
FOREIGN_HOSTS += [
    "localhost.evil.example",
    "127.0.0.1.evil.example:80",
    "127.0.0.2",
    "0.0.0.0",
    "[::1]",
    "",
    "localhost:",
]
FOREIGN_HOSTS += ["localhost:123456", "localhost/", "127.0.0.1:80:80", "localhost:²", "localhost, evil.example"]
OWN_HOSTS = ["localhost", "LocalHost", "127.0.0.1", "localhost:1", "127.0.0.1:65535"]
FROM_ELSEWHERE = [
    f"Sec-Fetch-Site: {site}" for site in ("cross-site", "same-site", "", "none, cross-site", "Same-Origin")
]
FROM_ELSEWHERE += [
    f"Origin: {origin}" for origin in ("http://evil.example", "null", "https://localhost", "http://localhost:81")
]
FROM_ELSEWHERE += ["Sec-Fetch-Site: same-origin\r\nSec-Fetch-Site: cross-site", "Host: localhost", "Host: evil.example"]
FROM_HERE = ["Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: none", "Origin: http://localhost", "X: y"]


def test_requests_from_other_pages_are_refused() -> None:
    player = Player(make_model())
    with served(player) as port:
        for path in ("/", "/images?seed=0", "/attention?seed=0&x=0&y=0"):
            for host in FOREIGN_HOSTS:
                assert request_raw(port, f"GET {path} HTTP/1.1", f"Host: {host}")[0] == 403, host
            for line in FROM_ELSEWHERE:
                assert request_raw(port, f"GET {path} HTTP/1.1", "Host: localhost", line)[0] == 403, line
        assert request_raw(port, "GET /images?seed=0 HTTP/1.0")[0] == 403
        assert not player.images
        for host in OWN_HOSTS:
            assert request_raw(port, "GET /images?seed=0 HTTP/1.1", f"Host: {host}")[0] == 200, host
        for line in FROM_HERE:
            assert request_raw(port, "GET / HTTP/1.1", "Host: localhost", line)[0] == 200, line


def test_a_link_may_open_only_the_page() -> None:
    window = ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document")
    frame = (*window[:2], "Sec-Fetch-Dest: iframe")
    script = (window[0], "Sec-Fetch-Mode: no-cors", window[2])
    player = Player(make_model())
    with served(player) as port:
        for host, path, lines, status in (
            ("localhost", "/", window, 200),
            ("localhost", "/?x=1", window, 200),
            ("localhost", "/", frame, 403),
            ("localhost", "/", script, 403),
            ("localhost", "/", (*window, "Sec-Fetch-Dest: iframe"), 403),
            ("localhost", "/images?seed=0", window, 403),
            ("localhost", "/attention?seed=0&x=0&y=0", window, 403),
            ("evil.example", "/", window, 403),
        ):
            assert request_raw(port, f"GET {path} HTTP/1.1", f"Host: {host}", *lines)[0] == status, (path, lines)
    assert not player.images


def test_other_pages_cannot_frame_or_read_the_page() -> None:
    with served(Player(make_model())) as port:
        for path in ("/", "/images?seed=0", "/images", "/nothing"):
            response = request_raw(port, f"GET {path} HTTP/1.1", "Host: localhost")[1]
            for line in (
                "X-Frame-Options: DENY",
                "Cross-Origin-Resource-Policy: same-origin",
                "frame-ancestors 'none'",
            ):
                assert line in response, path
            assert "Access-Control" not in response
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
            assert request_raw(port, f"{method} / HTTP/1.1", "Host: localhost")[0] == 501


def test_a_silent_connection_is_closed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    player = Player(make_model())
    with monkeypatch.context() as patch:
        patch.setattr("exploration.play.IDLE_TIMEOUT", 0.1)
        with served(player) as port:
            for sent in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: loc"):
                with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
                    connection.sendall(sent)
                    assert connection.recv(1) == b""
    with served(player) as port:  # now with the default timeout
        assert get(port, "/")[0] == 200
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory.\nOf 80 GiB"), ValueError("CUDA out of memory.")])
def test_a_failed_request_gets_an_error_response(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(model: Model, ws: torch.Tensor) -> torch.Tensor:
        raise error

    with served(Player(make_model())) as port:
        with monkeypatch.context() as patch:
            patch.setattr(Model, "images", failing)
            status, body = get(port, "/images?seed=0")
        assert (status, json.loads(body)) == (500, {"error": "CUDA out of memory."})
        assert len(request_json(port, "images", seed=0)["images"]) == 1


def test_the_page_shows_only_supported_controls() -> None:
    thirds = {"coarse", "middle", "fine"}
    for model, groups, has_attention in (
        (make_model("styleformer-c"), thirds | {"transformer", "conv"}, True),
        (make_model("stylegan2"), thirds, False),
        (model_of(TRANSGAN), set(), True),
    ):
        page = Player(model).page()
        facts = json.loads(re.search(r"MODEL = (\{.*\}), COUNT", page)[1])  # type: ignore[index]
        assert facts["attention"] is has_attention
        assert set(facts["groups"]) == groups
        assert not re.search(r"(src|href)=.?https?:", page)


def test_the_command_serves_until_ctrl_c_and_names_a_port_in_use(
    shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_snapshot(tmp_path / "n.pkl", shapes_zip)

    def interrupted(server: ThreadingHTTPServer) -> None:
        assert server.server_address[0] == "127.0.0.1"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ThreadingHTTPServer, "serve_forever", interrupted)
        assert re.search(r"Serving http://127\.0\.0\.1:\d+/,", run_ok("play", f"--network={network}", "--port=0"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("play", f"--network={network}", f"--port={port}")
    assert (result.exit_code, f"--port={port}: cannot be used" in result.output) == (2, True)


def run_in_browser(browser: str, model: Model, script: str) -> Any:
    """Run a script on the loaded page and return the result; the script can wait with `until(predicate)`."""
    probe = """<script>
      const until = async done => { while (!done()) await new Promise(go => setTimeout(go, 20)); };
      (async () => {
        await until(() => cells.every(cell => cell.firstChild.src) && $("large").src);
        const found = await (async () => { SCRIPT })().catch(String);
        document.body.dataset.found = JSON.stringify(found);
      })();
    </script></body>"""

    class Probed(Player):
        def page(self) -> str:
            return super().page().replace("</body>", probe.replace("SCRIPT", script))

    options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom")
    with served(Probed(model)) as port:
        command = [browser, *options, f"http://127.0.0.1:{port}/"]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    found = re.search(r'data-found="([^"]*)"', dom.stdout)
    assert found, dom.stdout[-2000:]
    return json.loads(html.unescape(found[1]))


def test_a_browser_shows_mixing_and_attention(chromium: str) -> None:
    script = """
        const large = $("large"), before = large.src;
        $("pick").click();
        cells[2].click();
        await until(() => large.src != before);
        const box = large.getBoundingClientRect();
        large.onclick({clientX: box.left + box.width / 2, clientY: box.top + 1});
        await until(() => document.querySelectorAll("#maps img").length);
        large.onkeydown(new KeyboardEvent("keydown", {key: "ArrowDown"}));
        await until(() => !("maps" in queued));
        const maps = document.querySelectorAll("#maps img").length;
        return [maps, pixel, $("caption").textContent, $("problem").textContent];"""
    maps, pixel, caption, problem = run_in_browser(chromium, make_model(), script)
    assert (maps, pixel, problem) == (5, [16, 1], "")  # the query position, and four blocks
    assert "with styles coarse of seed 2" in caption


def test_a_browser_hides_mixing_without_styles(chromium: str) -> None:
    """TransGAN has one style, so a shift-click selects like a click. Two clicks on the arrow advance two pages."""
    script = """
        $("after").click();
        $("after").click();
        await until(() => first == 48);
        cells[2].onclick({shiftKey: true});
        await until(() => !("large" in queued));
        return [$("caption").textContent, other, cells[2].className];"""
    caption, other, kind = run_in_browser(chromium, model_of(TRANSGAN), script)
    assert (caption.partition(".")[0], other, kind) == ("Seed 50", None, "chosen")
