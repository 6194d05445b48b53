"""The server of generate.py play: requests from other sites are refused, failures answered, silence ended."""

from __future__ import annotations

import json
import re
import socket
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE
from exploration_helpers import make_model, make_snapshot, run, run_ok
from play_helpers import get, player_of, request_json, served

from exploration.model import Model


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
    player = player_of(make_model())
    with served(player) as port:
        for path in ("/", "/images?of=0", "/attention?of=0&x=0&y=0"):
            for host in FOREIGN_HOSTS:
                assert request_raw(port, f"GET {path} HTTP/1.1", f"Host: {host}")[0] == 403, host
            for line in FROM_ELSEWHERE:
                assert request_raw(port, f"GET {path} HTTP/1.1", "Host: localhost", line)[0] == 403, line
        assert request_raw(port, "GET /images?of=0 HTTP/1.0")[0] == 403
        assert not player.renderer.cache.images
        for host in OWN_HOSTS:
            assert request_raw(port, "GET /images?of=0 HTTP/1.1", f"Host: {host}")[0] == 200, host
        for line in FROM_HERE:
            assert request_raw(port, "GET / HTTP/1.1", "Host: localhost", line)[0] == 200, line


def test_a_link_may_open_only_the_page() -> None:
    window = ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document")
    frame = (*window[:2], "Sec-Fetch-Dest: iframe")
    script = (window[0], "Sec-Fetch-Mode: no-cors", window[2])
    player = player_of(make_model())
    with served(player) as port:
        for host, path, lines, status in (
            ("localhost", "/", window, 200),
            ("localhost", "/?x=1", window, 200),
            ("localhost", "/", frame, 403),
            ("localhost", "/", script, 403),
            ("localhost", "/", (*window, "Sec-Fetch-Dest: iframe"), 403),
            ("localhost", "/images?of=0", window, 403),
            ("localhost", "/attention?of=0&x=0&y=0", window, 403),
            ("evil.example", "/", window, 403),
        ):
            assert request_raw(port, f"GET {path} HTTP/1.1", f"Host: {host}", *lines)[0] == status, (path, lines)
    assert not player.renderer.cache.images


def test_other_pages_cannot_frame_or_read_the_page() -> None:
    with served(player_of(make_model())) as port:
        for path in ("/", "/images?of=0", "/images", "/nothing"):
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
    player = player_of(make_model())
    with monkeypatch.context() as patch:
        patch.setattr("exploration.browser.server.IDLE_TIMEOUT", 0.1)
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

    with served(player_of(make_model())) as port:
        with monkeypatch.context() as patch:
            patch.setattr(Model, "images", failing)
            status, body = get(port, "/images?of=0")
        assert (status, json.loads(body)) == (500, {"error": "CUDA out of memory."})
        assert len(request_json(port, "images", of=0)["images"]) == 1


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
