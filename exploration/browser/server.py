"""HTTP server of the browser page, on the loopback address. Only requests from the page itself are answered."""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import urlsplit

from dnnlib.config import UserError
from dnnlib.util import describe_error

HOST = "127.0.0.1"
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


@dataclass(frozen=True)
class File:
    """A file to download, with its media type."""

    content: bytes
    media_type: str


Answer = Mapping[str, Any] | File


class Site(Protocol):
    """Content of the server."""

    paths: frozenset[str]

    def page(self) -> str:
        """Return the HTML of `/`."""

    def answer(self, path: str, query: str) -> Answer:
        """Return the response to a request for one of `paths`. Raises UserError for an invalid query."""


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


def open_server(site: Site, port: int) -> ThreadingHTTPServer:
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
            if parts.path in site.paths:
                return self._send(*self._answer(parts.path, parts.query))
            if parts.path == "/":
                return self._send(200, File(site.page().encode(), "text/html; charset=utf-8"))
            return self._send(404, {"error": "no such page"})

        def _answer(self, path: str, query: str) -> tuple[int, Answer]:
            try:
                return 200, site.answer(path, query)
            except UserError as error:
                return 400, {"error": str(error)}
            except Exception as error:  # e.g. out of memory; the next request may succeed
                traceback.print_exc()
                return 500, {"error": describe_error(error)}

        def _send(self, status: int, answer: Answer) -> None:
            file = answer if isinstance(answer, File) else File(json.dumps(answer).encode(), "application/json")
            self.send_response(status)
            self.send_header("Content-Type", file.media_type)
            self.send_header("Content-Length", str(len(file.content)))
            for name, value in HEADERS.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(file.content)

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
