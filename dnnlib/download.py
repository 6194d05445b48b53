"""Cached downloads: each file is fetched once, atomically, and its checksum is verified on every use.

An interrupted download resumes, in this call or the next, if the server supports it. Share links of Google Drive work
directly: the confirmation page for large files is answered automatically.

Servers are not trusted: sizes and times are limited, nothing is decompressed, and URLs in messages and records are
stripped of possible secrets (`dnnlib.screen.public`).
"""

from __future__ import annotations

import hashlib
import html.parser
import json
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urldefrag, urlencode, urljoin, urlsplit

import requests
import urllib3
from tqdm import tqdm

from dnnlib.config import UserError
from dnnlib.screen import printable, public, without_secrets
from dnnlib.util import home_folder, read_json, read_regular, write_atomically

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TIMEOUT = 20  # seconds without a byte from the server
RESPONSE_SECONDS = 120  # time limit for the complete response headers, including redirects
PACE_SECONDS, PACE_BYTES = 60, 1 << 16  # abort if fewer bytes arrive within this many seconds
MAX_BYTES = 1 << 36  # size limit of a file: 64 GiB
ATTEMPTS = 5  # maximum number; an attempt without progress is the last one
CHUNK = 1 << 16  # bytes written at a time
RECORD_BYTES = 1 << 16  # size limit of the records beside a file
PAGE_BYTES = 1 << 20  # bytes of an HTML page that are parsed
REMEDY = "remove it, or set DNNLIB_CACHE_DIR to another folder"
DRIVE_HOSTS = ("drive.google.com", "docs.google.com", "drive.usercontent.google.com")

Check = Callable[[Path], object]


def cache_dir() -> Path:
    """Return the cache folder for downloads and computed files: DNNLIB_CACHE_DIR or ~/.cache/dnnlib.

    Raises UserError if the user has no home folder.
    """
    given = os.environ.get("DNNLIB_CACHE_DIR")
    return Path(given) if given else home_folder("DNNLIB_CACHE_DIR") / ".cache" / "dnnlib"


def _make_folder(folder: Path) -> None:
    """Create a cache folder and its missing parents. Raises UserError like `_trusted`."""
    for place in (*reversed(folder.parents), folder):
        _trusted(place)
        if not place.is_dir():
            place.mkdir(mode=0o700, exist_ok=True)


def _trusted(path: Path) -> Path:
    """Return a path in the cache unchanged. Raises UserError if it contains a symbolic link of another user."""
    for place in (*reversed(path.parents), path):
        is_inside = place != cache_dir() and place.is_relative_to(cache_dir())
        if is_inside and place.is_symlink() and hasattr(os, "getuid") and place.lstat().st_uid != os.getuid():
            raise UserError(f"{place}: is a link owned by another user, which the cache does not follow; {REMEDY}")
    return path


def _to_read(path: Path) -> Path:
    """Return the path of a cached file to read or replace. Raises UserError if it exists and is not a file."""
    if os.path.lexists(_trusted(path)) and not path.is_file():
        raise UserError(f"{path}: is not a file; {REMEDY}")
    return path


def _to_write(path: Path) -> Path:
    """Return the path of a cached file to write in place. Raises UserError for links and files with hard links."""
    try:
        found = _trusted(path).lstat()
    except FileNotFoundError:
        return path
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise UserError(f"{path}: is a link or not a file, which the cache does not write to; {REMEDY}")
    return path


def _opener(path: str, flags: int) -> int:
    """Opener for `open` that creates files with mode 0600 and does not follow symbolic links."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o600)


def is_url(name: object) -> bool:
    """Return whether a name is an http(s) URL rather than a path."""
    return isinstance(name, str) and re.match(r"https?://", name) is not None


def cached_path(url: str) -> Path:
    """Return the cache path of a URL: a folder per URL, and the file's own name in it."""
    address, _ = urldefrag(url)
    parts = urlsplit(address)
    name = f"{_drive_id(address)}.pkl" if _is_drive(address) else unquote(parts.path).rpartition("/")[2]
    name = re.sub(r"[^\w.+-]", "_", name).lstrip(".") or "file"
    return cache_dir() / "downloads" / hashlib.sha256(address.encode()).hexdigest()[:16] / name


def fetch(url: str) -> Path:
    """Return the cached file of a URL, downloading it on first use.

    The sha256 is recorded with the download and verified on every later use. A fragment `#sha256=...` of the URL, with
    at least the first 8 digits, is verified as well. Raises UserError, with the URL.
    """
    _check_address(url)
    address, fragment = urldefrag(url)
    expected = _expected_digest(url, fragment)
    path = _to_read(cached_path(url))
    record = _to_read(path.with_name(f"{path.name}.json"))
    if not path.is_file():
        download(address, path, check=lambda part: _check_digest(part, expected, url))
    digest = sha256_of_file(path)
    if record.is_file():
        recorded = _read_record(record)
        if recorded != digest:
            raise UserError(f"{path}: has changed since it was fetched; delete it to fetch it again")
    else:
        about = {"url": public(address), "sha256": digest, "bytes": path.stat().st_size}
        write_atomically(record, json.dumps(about) + "\n", mode=0o600)
    _check_digest(path, expected, url, digest)
    return path


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_valid = bool(parts.hostname) and parts.port != 0
    except ValueError:  # its message may contain parts of a password
        is_valid = False
    if not is_valid:
        raise UserError(f"{public(url)}: invalid URL: no host, or a bad port")


def _expected_digest(url: str, fragment: str) -> str:
    if not fragment:
        return ""
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{8,64})", fragment)
    if not match:
        raise UserError(f"{public(url)}: only sha256=... with at least 8 digits is supported after #")
    return match[1].lower()


def _check_digest(path: Path, expected: str, url: str, digest: str | None = None) -> None:
    found = digest or sha256_of_file(path)
    if not found.startswith(expected):
        raise UserError(f"{public(url)}: the file's sha256 is {found}, which does not match")


def _read_record(record: Path) -> str:
    try:
        return str(read_json(record, RECORD_BYTES)["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record}: cannot be read ({error}); delete it and the file beside it") from None


def sha256_of_file(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, path: Path, *, check: Check | None = None) -> None:
    """Download a file to `path`; it appears there only when it is complete and has passed `check`.

    One process downloads while the others wait. Raises UserError, with the URL.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        _make_folder(path.parent)
        with _exclusive(part):
            if path.is_file():
                return
            print(f"Fetching {printable(public(url))} ...", file=sys.stderr, flush=True)
            _fetch_all(_direct(url), part)
            try:
                if check is not None:
                    check(part)
            except UserError:
                _discard(part)
                raise
            os.replace(part, path)
            _validator_of(part).unlink(missing_ok=True)
    except UserError:
        raise
    except requests.Timeout:
        raise UserError(f"{public(url)}: could not be fetched (no response for {TIMEOUT} seconds)") from None
    # Network errors (including OSError), disk errors, and ValueError for an invalid redirect URL.
    except (OSError, urllib3.exceptions.HTTPError, ValueError) as error:
        raise UserError(f"{public(url)}: could not be fetched ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """Return the reason of a failed download without secrets; errors of requests contain the full URL."""
    cause = getattr(error.args[0], "reason", None) if error.args else None
    return printable(without_secrets(str(cause or error)))[:200]


@contextmanager
def _exclusive(part: Path) -> Iterator[None]:
    """Hold the download lock of a file, waiting for other processes; no lock without fcntl."""
    if fcntl is None:
        yield
        return
    lock = part.with_suffix(".lock")
    while True:
        with open(_to_write(lock), "wb", opener=_opener) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not lock.is_file() or not os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                continue  # the previous holder has removed the lock file
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _validator_of(part: Path) -> Path:
    """Return the path of the file that stores the ETag or Last-Modified value of a partial download."""
    return part.with_suffix(".etag")


def _discard(part: Path) -> None:
    for path in (part, _validator_of(part)):
        path.unlink(missing_ok=True)


def _fetch_all(url: str, part: Path) -> None:
    """Download to `part`, resuming after broken connections as long as each attempt makes progress."""
    with requests.Session() as session:
        for attempt in range(1, ATTEMPTS + 1):
            before = _size(part)
            try:
                _fetch_remainder(session, url, part)
                return
            except (requests.ConnectionError, requests.Timeout, _TruncatedError):
                after = _size(part)
                if not _validator_of(part).is_file():
                    _discard(part)  # the server does not support resuming
                if attempt == ATTEMPTS or after <= before or not part.is_file():
                    raise


class _TruncatedError(OSError):
    """The response ended before Content-Length bytes were received."""


def _size(path: Path) -> int:
    return path.stat().st_size if _to_write(path).is_file() else 0


def _fetch_remainder(session: requests.Session, url: str, part: Path) -> None:
    """Download the remainder of `part`. Raises OSError if interrupted, UserError if the response is not a file."""
    validator = _to_write(_validator_of(part))
    start = _size(part) if validator.is_file() else 0
    headers = {"Accept-Encoding": "identity"}  # uncompressed, so that Content-Length is the size of the file
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": read_regular(validator, RECORD_BYTES).decode()}
    response = _get_file(session, url, headers)
    with response:
        is_resumed = response.status_code == 206
        start = start if is_resumed else 0
        _save_etag(response, validator)
        total = _total_size(response, start, url)
        with (
            open(part, "ab" if is_resumed else "wb", opener=_opener) as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, disable=None, leave=False) as progress,
        ):
            for chunk in _chunks(response):
                if file.tell() + len(chunk) > MAX_BYTES:
                    raise UserError(f"{public(url)}: exceeds the download limit of {MAX_BYTES} bytes")
                file.write(chunk)
                progress.update(len(chunk))
    found = _size(part)
    if total is not None and found != total:
        raise _TruncatedError(f"truncated after {found} of {total} bytes")


def _save_etag(response: requests.Response, validator: Path) -> None:
    """Store the strong ETag or Last-Modified value of a response, if any, to resume the download with If-Range."""
    validator.unlink(missing_ok=True)
    name = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    if not name.startswith("W/") and re.fullmatch(r"[ -~]{1,500}", name):
        with open(validator, "xb", opener=_opener) as file:
            file.write(name.encode())


def _total_size(response: requests.Response, start: int, url: str) -> int | None:
    """Return the total file size from Content-Length; None without it. Raises UserError for an invalid size."""
    length = response.headers.get("Content-Length")
    if length is None:
        return None
    if not re.fullmatch(r"[0-9]{1,15}", length):
        raise UserError(f"{public(url)}: the server sent an invalid Content-Length, {printable(length[:40])!r}")
    if start + int(length) > MAX_BYTES:
        raise UserError(
            f"{public(url)}: has {start + int(length)} bytes (Content-Length), more than the limit of {MAX_BYTES}: "
            "download the file manually and specify its path"
        )
    return start + int(length)


def _chunks(response: requests.Response) -> Iterator[bytes]:
    """Yield bytes as the server sends them. Raises OSError on a timeout, a broken connection, or a slow transfer."""
    since, count = time.monotonic(), 0
    while True:
        try:
            chunk = response.raw.read1(CHUNK, decode_content=False)
        except urllib3.exceptions.TimeoutError as error:
            raise requests.Timeout from error
        except urllib3.exceptions.HTTPError as error:
            raise _TruncatedError(f"truncated: {error}") from None
        if not chunk:
            return
        yield chunk
        count += len(chunk)
        seconds = time.monotonic() - since
        if seconds > PACE_SECONDS:
            if count < PACE_BYTES:
                raise OSError(f"the server sent only {count} bytes in {seconds:.0f} seconds, which is too slow")
            since, count = time.monotonic(), 0


def _get(session: requests.Session, url: str, headers: dict[str, str]) -> requests.Response:
    """Send a GET request; return the response once its headers are complete, or raise TimeoutError.

    The limit is RESPONSE_SECONDS; the timeout of requests restarts with every byte and does not limit the total time.
    """
    results: list[requests.Response | Exception] = []

    def send() -> None:
        try:
            results.append(session.get(url, headers=headers, stream=True, timeout=TIMEOUT))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=send, name="download", daemon=True)  # daemon, because the request may never end
    thread.start()
    thread.join(RESPONSE_SECONDS)
    if not results:
        raise TimeoutError(f"no complete response after {RESPONSE_SECONDS} seconds")
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def _get_file(session: requests.Session, url: str, headers: dict[str, str]) -> requests.Response:
    """Return the response that contains the file, not an HTML page. Raises UserError for any other response."""
    for _ in range(3):
        response = _get(session, url, headers)
        # 416: the file is shorter than the partial download.
        if response.status_code in (206, 416) and not _is_requested_range(response, headers):
            response.close()
            response = _get(session, url, {"Accept-Encoding": "identity"})
        if response.status_code != 200 and not _is_requested_range(response, headers):
            response.close()
            reason = printable(str(response.reason))[:100]
            raise UserError(f"{public(url)}: the server returned {response.status_code} {reason}")
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            response.close()
            raise UserError(
                f"{public(url)}: the response is compressed ({printable(encoding[:40])}), which is not supported "
                "because the unpacked size is unknown: download the file manually and specify its path"
            )
        if not response.headers.get("Content-Type", "").lower().startswith("text/html"):
            return response
        with response:
            page = _read_page(response)
        confirmed = _confirmation_url(response, page) if _is_drive(response.url) else None
        if confirmed is None:
            title = f" ({page.title.strip()[:100]!r})" if page.title.strip() else ""
            raise UserError(
                f"{public(url)}: the response is an HTML page{title}, not a file; is the link public and direct?"
            )
        url = confirmed
    raise UserError(f"{public(url)}: the server keeps returning HTML pages")


def _is_requested_range(response: requests.Response, headers: dict[str, str]) -> bool:
    """Return whether a response is partial content from the requested position."""
    requested = headers.get("Range", "none").replace("=", " ")  # bytes START-
    return response.status_code == 206 and response.headers.get("Content-Range", "").startswith(requested)


# Google Drive


def _is_drive(url: str) -> bool:
    return urlsplit(url).hostname in DRIVE_HOSTS


def _drive_id(url: str) -> str:
    """Return the file id in a share link; '' if there is none."""
    parts = urlsplit(url)
    match = re.search(r"/d/([\w-]+)", parts.path)
    return match[1] if match else parse_qs(parts.query).get("id", [""])[0]


def _direct(url: str) -> str:
    """Return the download URL for a share link of Google Drive; other URLs unchanged."""
    if not _is_drive(url):
        return url
    if not _drive_id(url):
        raise UserError(f"{public(url)}: is not a Google Drive file; copy the link of a file, not of a folder")
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}/uc?{urlencode({'export': 'download', 'id': _drive_id(url)})}"


def _confirmation_url(response: requests.Response, page: Page) -> str | None:
    """Return the download URL in Google Drive's confirmation page for large files; None for other pages."""
    if page.form and "id" in page.inputs:
        address = f"{urljoin(response.url, page.form)}?{urlencode(page.inputs)}"
    elif page.link:
        address = urljoin(response.url, page.link)
    elif token := next((text for name, text in response.cookies.items() if name.startswith("download_warning")), None):
        address = f"{response.url}&{urlencode({'confirm': token})}"
    else:
        return None
    return address if _is_drive(address) else None


@dataclass
class Page(html.parser.HTMLParser):
    """HTML parser for Google Drive's pages: title, download form with its inputs, confirmation link."""

    title: str = ""
    form: str = ""
    link: str = ""
    inputs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.tag = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tag = tag
        values = {name: value or "" for name, value in attrs}
        if tag == "form" and not self.form:
            self.form = values.get("action", "")
        elif tag == "input" and "name" in values and self.form:
            self.inputs[values["name"]] = values.get("value", "")
        elif tag == "a" and "confirm=" in values.get("href", ""):
            self.link = self.link or values["href"]

    def handle_endtag(self, tag: str) -> None:
        self.tag = ""

    def handle_data(self, data: str) -> None:
        if self.tag == "title":
            self.title += data


def _read_page(response: requests.Response) -> Page:
    data = b""
    for chunk in _chunks(response):
        data += chunk
        if len(data) >= PAGE_BYTES:
            break
    page = Page()
    page.feed(data[:PAGE_BYTES].decode("utf-8", "replace"))
    return page
