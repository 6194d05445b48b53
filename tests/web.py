"""Web server in a thread: files with or without ETag, ranges, truncated responses, redirects, Google Drive pages."""

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
    """Server of `files` and `pages` by path. Each response to a file is truncated to the next length in `breaks`."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.breaks: dict[str, list[int]] = {}
        self.pages: Pages = {}
        self.has_etags = True
        self.skips = 0  # bytes by which a range response starts too late
        self.requests: list[tuple[str, str | None]] = []  # path with query, Range header
        self.confirm: str | None = None  # token that Drive requires in place of its page
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.answer(self)

            def log_message(self, *_: Any) -> None:
                """Log nothing."""

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
        """Send the requested page or file, or status 404."""
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
        requested = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if requested and handler.headers.get("If-Range") == etag:
            start = int(requested[1]) + self.skips
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
    """Yield the URL of a server that answers every request with these bytes; with `pause`, one byte at a time."""
    stopped = threading.Event()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                """Skip the rest of the request."""
            with suppress(OSError):
                for piece in [answer[i : i + 1] for i in range(len(answer))] if pause else [answer]:
                    self.wfile.write(piece)
                    if pause and stopped.wait(pause):
                        return

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            stopped.set()
            server.shutdown()
            thread.join()
