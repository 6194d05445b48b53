"""A web server in a thread: files with and without ETag, in parts, cut off, moved; and what Google Drive answers."""

from __future__ import annotations

import re
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

Pages = dict[str, tuple[int, dict[str, str], bytes]]


class Site:
    """Answers with `files` by path, cut off after as many bytes as `breaks` says, and with `pages` as they are."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.breaks: dict[str, list[int]] = {}
        self.pages: Pages = {}
        self.has_etags = True
        self.skips = 0  # bytes by which a part begins later than was asked for
        self.requests: list[tuple[str, str | None]] = []  # path with query, and the range asked for
        self.confirm: str | None = None  # the token without which Drive shows a page
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.answer(self)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Self:
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer a request for a file or a page, else with 404."""
        self.requests.append((handler.path, handler.headers.get("Range")))
        parts = urlsplit(handler.path)
        page = self.pages.get(handler.path) or self.pages.get(parts.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if page and self.confirm in (None, query.get("confirm")) and query.get("id") == "FILE":
            page = None  # confirmed
        if page:
            status, headers, body = page
            send(handler, status, headers, body)
        elif parts.path in self.files:
            self.send_file(handler, parts.path)
        else:
            send(handler, 404, {}, b"")

    def send_file(self, handler: BaseHTTPRequestHandler, path: str) -> None:
        data = self.files[path]
        etag = f'"{hash(data)}"'
        headers = {"Content-Type": "application/octet-stream"} | ({"ETag": etag} if self.has_etags else {})
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if asked and handler.headers.get("If-Range") == etag:
            start = int(asked[1]) + self.skips
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        rest = data[start:]
        breaks = self.breaks.get(path, [])
        count = breaks.pop(0) if breaks else len(rest)
        send(handler, 206 if start else 200, headers, rest[:count], announced=len(rest))
        if count < len(rest):
            handler.close_connection = True


def send(
    handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes, announced: int | None = None
) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body) if announced is None else announced))
    handler.end_headers()
    handler.wfile.write(body)


@contextmanager
def answering(answer: bytes, pause: float = 0.0) -> Iterator[str]:
    """The address of a server that sends these bytes whatever it is asked, one by one with a pause after each."""
    over = threading.Event()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                """Up to the end of the request."""
            with suppress(OSError):
                for piece in [answer[i : i + 1] for i in range(len(answer))] if pause else [answer]:
                    self.wfile.write(piece)
                    if pause and over.wait(pause):
                        return

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            over.set()
            server.shutdown()
            thread.join()
