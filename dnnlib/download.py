"""Files from the web: fetched once into the cache, whole or not at all, and checked whenever they are used.

A download that breaks off goes on where it stopped if the server lets it, now or the next time. Google Drive's links
work as they are shared: its page that asks whether a large file is really wanted is answered.

A server is not trusted: sizes and times have bounds, nothing is unpacked, and messages and records name addresses
without what may be secret in them (`dnnlib.screen.public`).
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
ANSWER_SECONDS = 120  # until it has said what it will send, redirections included
PACE_SECONDS, PACE_BYTES = 60, 1 << 16  # an interval that brings fewer bytes is no progress worth waiting for
MAX_BYTES = 1 << 36  # bytes of a file: 64 GiB
ATTEMPTS = 5  # to go on after a break; without any progress there is no further one
CHUNK = 1 << 16  # bytes that are written at a time
RECORD_BYTES = 1 << 16
PAGE_BYTES = 1 << 20  # of HTML that are looked at
REMEDY = "remove it, or set DNNLIB_CACHE_DIR to another folder"
DRIVE_HOSTS = ("drive.google.com", "docs.google.com", "drive.usercontent.google.com")

Check = Callable[[Path], object]


def cache_dir() -> Path:
    """Return the folder for files that are fetched or computed once: DNNLIB_CACHE_DIR or ~/.cache/dnnlib.

    Raises UserError where this user has no home.
    """
    given = os.environ.get("DNNLIB_CACHE_DIR")
    return Path(given) if given else home_folder("DNNLIB_CACHE_DIR") / ".cache" / "dnnlib"


def _make_folder(folder: Path) -> None:
    """Make a folder of the cache, and what is missing above it. Raises UserError as `_trusted` does."""
    for place in (*reversed(folder.parents), folder):
        _trusted(place)
        if not place.is_dir():
            place.mkdir(mode=0o700, exist_ok=True)


def _trusted(path: Path) -> Path:
    """Return a path in the cache. Raises UserError where it leads through a link that is not this user's."""
    for place in (*reversed(path.parents), path):
        is_inside = place != cache_dir() and place.is_relative_to(cache_dir())
        if is_inside and place.is_symlink() and hasattr(os, "getuid") and place.lstat().st_uid != os.getuid():
            raise UserError(f"{place}: is a link of another user, which the cache does not follow; {REMEDY}")
    return path


def _to_read(path: Path) -> Path:
    """Return the path of a file in the cache to read or to replace. Raises UserError where anything else lies there."""
    if os.path.lexists(_trusted(path)) and not path.is_file():
        raise UserError(f"{path}: is no file, or a link to none; {REMEDY}")
    return path


def _to_write(path: Path) -> Path:
    """Return the path of a file in the cache to write in its place, which may have no other name."""
    try:
        found = _trusted(path).lstat()
    except FileNotFoundError:
        return path
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise UserError(f"{path}: is a link or no file, which the cache does not write to; {REMEDY}")
    return path


def _opener(path: str, flags: int) -> int:
    """Open a file for `open`: a new one with the mode of the cache, and never the target of a link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o600)


def is_url(name: object) -> bool:
    """Whether this is the address of a file on the web rather than a path."""
    return isinstance(name, str) and re.match(r"https?://", name) is not None


def cached_path(url: str) -> Path:
    """Return where the file behind an address is kept: one folder per address, the file's own name in it."""
    address, _ = urldefrag(url)
    parts = urlsplit(address)
    name = f"{_drive_id(address)}.pkl" if _is_drive(address) else unquote(parts.path).rpartition("/")[2]
    name = re.sub(r"[^\w.+-]", "_", name).lstrip(".") or "file"
    return cache_dir() / "downloads" / hashlib.sha256(address.encode()).hexdigest()[:16] / name


def fetch(url: str) -> Path:
    """Return the file behind an address, fetching it the first time.

    Its sha256 is recorded beside it at first and checked from then on. `#sha256=...` at the end of the address, or its
    first digits, at least 8, is checked too. Raises UserError naming the address.
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
            raise UserError(f"{path}: has changed since it was fetched; delete it, and it is fetched again")
    else:
        about = {"url": public(address), "sha256": digest, "bytes": path.stat().st_size}
        write_atomically(record, json.dumps(about) + "\n", mode=0o600)
    _check_digest(path, expected, url, digest)
    return path


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_valid = bool(parts.hostname) and parts.port != 0
    except ValueError:  # whose message would repeat parts of a password
        is_valid = False
    if not is_valid:
        raise UserError(f"{public(url)}: invalid URL: no host, or a bad port")


def _expected_digest(url: str, fragment: str) -> str:
    if not fragment:
        return ""
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{8,64})", fragment)
    if not match:
        raise UserError(f"{public(url)}: after # only sha256=... is understood, with at least 8 digits")
    return match[1].lower()


def _check_digest(path: Path, expected: str, url: str, digest: str | None = None) -> None:
    found = digest or sha256_of_file(path)
    if not found.startswith(expected):
        raise UserError(f"{public(url)}: the file's sha256 is {found}, another one")


def _read_record(record: Path) -> str:
    try:
        return str(read_json(record, RECORD_BYTES)["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record}: cannot be read ({error}); delete it and the file beside it") from None


def sha256_of_file(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, path: Path, *, check: Check | None = None) -> None:
    """Fetch a file to `path`, where it appears when it is whole and `check` has not raised UserError.

    One process fetches, others wait for it. Raises UserError naming the address.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        _make_folder(path.parent)
        with _alone(part):
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
        raise UserError(f"{public(url)}: could not be fetched (no answer for {TIMEOUT} seconds)") from None
    # Of the network, whose errors are OSErrors too, of the disk, and of an address that the server leads to.
    except (OSError, urllib3.exceptions.HTTPError, ValueError) as error:
        raise UserError(f"{public(url)}: could not be fetched ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """Return in words why something could not be fetched. The errors of requests tell the whole address."""
    cause = getattr(error.args[0], "reason", None) if error.args else None
    return printable(without_secrets(str(cause or error)))[:200]


@contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Wait until no other process fetches this file; without fcntl nothing waits."""
    if fcntl is None:
        yield
        return
    lock = part.with_suffix(".lock")
    while True:
        with open(_to_write(lock), "wb", opener=_opener) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not lock.is_file() or not os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                continue  # who had it before has removed it
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _validator_of(part: Path) -> Path:
    """Return the file that keeps the server's name for this version while it is fetched."""
    return part.with_suffix(".etag")


def _discard(part: Path) -> None:
    for path in (part, _validator_of(part)):
        path.unlink(missing_ok=True)


def _fetch_all(url: str, part: Path) -> None:
    """Fetch into `part`, going on as long as there is progress."""
    with requests.Session() as session:
        for attempt in range(1, ATTEMPTS + 1):
            before = _size(part)
            try:
                _fetch_rest(session, url, part)
                return
            except (requests.ConnectionError, requests.Timeout, _CutOffError):
                after = _size(part)
                if not _validator_of(part).is_file():
                    _discard(part)  # the server has no way to go on
                if attempt == ATTEMPTS or after <= before or not part.is_file():
                    raise


class _CutOffError(OSError):
    """Fewer bytes came than were announced."""


def _size(path: Path) -> int:
    return path.stat().st_size if _to_write(path).is_file() else 0


def _fetch_rest(session: requests.Session, url: str, part: Path) -> None:
    """Fetch what is missing in `part`. Raises OSError when it breaks off, UserError for an answer that is no file."""
    validator = _to_write(_validator_of(part))
    start = _size(part) if validator.is_file() else 0
    headers = {"Accept-Encoding": "identity"}  # lengths are those of the file
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": read_regular(validator, RECORD_BYTES).decode()}
    answer = _answer(session, url, headers)
    with answer:
        goes_on = answer.status_code == 206
        start = start if goes_on else 0
        _save_etag(answer, validator)
        total = _announced(answer, start, url)
        with (
            open(part, "ab" if goes_on else "wb", opener=_opener) as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, disable=None, leave=False) as progress,
        ):
            for chunk in _chunks(answer):
                if file.tell() + len(chunk) > MAX_BYTES:
                    raise UserError(f"{public(url)}: is larger than the {MAX_BYTES} bytes that are fetched")
                file.write(chunk)
                progress.update(len(chunk))
    found = _size(part)
    if total is not None and found != total:
        raise _CutOffError(f"cut off after {found} of {total} bytes")


def _save_etag(answer: requests.Response, validator: Path) -> None:
    """Keep the server's name for this version of the file, if it has one that can be sent back."""
    validator.unlink(missing_ok=True)
    name = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    if not name.startswith("W/") and re.fullmatch(r"[ -~]{1,500}", name):
        with open(validator, "xb", opener=_opener) as file:
            file.write(name.encode())


def _announced(answer: requests.Response, start: int, url: str) -> int | None:
    """Return how large the whole file will be, None if the server does not say. Raises UserError for nonsense."""
    length = answer.headers.get("Content-Length")
    if length is None:
        return None
    if not re.fullmatch(r"[0-9]{1,15}", length):
        raise UserError(f"{public(url)}: the server announces {printable(length[:40])!r} bytes, which is no length")
    if start + int(length) > MAX_BYTES:
        raise UserError(
            f"{public(url)}: has {start + int(length)} bytes (Content-Length), more than the {MAX_BYTES} that are "
            "fetched: fetch it by other means, and give the file"
        )
    return start + int(length)


def _chunks(answer: requests.Response) -> Iterator[bytes]:
    """Yield bytes as the server sends them. Raises OSError when they do not come, or too slowly to wait for."""
    since, count = time.monotonic(), 0
    while True:
        try:
            chunk = answer.raw.read1(CHUNK, decode_content=False)
        except urllib3.exceptions.TimeoutError as error:
            raise requests.Timeout from error
        except urllib3.exceptions.HTTPError as error:
            raise _CutOffError(f"cut off: {error}") from None
        if not chunk:
            return
        yield chunk
        count += len(chunk)
        seconds = time.monotonic() - since
        if seconds > PACE_SECONDS:
            if count < PACE_BYTES:
                raise OSError(f"the server sent {count} bytes in {seconds:.0f} seconds, which is too slow to wait for")
            since, count = time.monotonic(), 0


def _get(session: requests.Session, url: str, headers: dict[str, str]) -> requests.Response:
    """Return the head of an answer. Raises TimeoutError where it takes too long, be it byte by byte."""
    answers: list[requests.Response | Exception] = []

    def ask() -> None:
        try:
            answers.append(session.get(url, headers=headers, stream=True, timeout=TIMEOUT))
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=ask, name="download", daemon=True)  # it may never end
    thread.start()
    thread.join(ANSWER_SECONDS)
    if not answers:
        raise TimeoutError(f"no complete answer after {ANSWER_SECONDS} seconds")
    if isinstance(answers[0], Exception):
        raise answers[0]
    return answers[0]


def _answer(session: requests.Session, url: str, headers: dict[str, str]) -> requests.Response:
    """Return the answer that is the file, not a page about it. Raises UserError when there is none."""
    for _ in range(3):
        answer = _get(session, url, headers)
        if answer.status_code in (206, 416) and not _is_rest(answer, headers):  # 416: shorter than what is here
            answer.close()
            answer = _get(session, url, {"Accept-Encoding": "identity"})
        if answer.status_code != 200 and not _is_rest(answer, headers):
            answer.close()
            reason = printable(str(answer.reason))[:100]
            raise UserError(f"{public(url)}: the server answers {answer.status_code} {reason}")
        encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            answer.close()
            raise UserError(
                f"{public(url)}: the server sends it compressed ({printable(encoding[:40])}) without being asked to; "
                "what it unpacks to has no bound: fetch it by other means, and give the file"
            )
        if not answer.headers.get("Content-Type", "").lower().startswith("text/html"):
            return answer
        with answer:
            page = _read_page(answer)
        confirmed = _confirm(answer, page) if _is_drive(answer.url) else None
        if confirmed is None:
            title = f" ({page.title.strip()[:100]!r})" if page.title.strip() else ""
            raise UserError(
                f"{public(url)}: the answer is a page of HTML{title}, not a file; is the link public and direct?"
            )
        url = confirmed
    raise UserError(f"{public(url)}: the server answers with one page of HTML after the other")


def _is_rest(answer: requests.Response, headers: dict[str, str]) -> bool:
    """Whether this is the rest of a file that was asked for, and not another part of it."""
    asked = headers.get("Range", "none").replace("=", " ")  # bytes START-
    return answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(asked)


# Google Drive


def _is_drive(url: str) -> bool:
    return urlsplit(url).hostname in DRIVE_HOSTS


def _drive_id(url: str) -> str:
    """Return the file's id in a link as it is shared, '' when there is none."""
    parts = urlsplit(url)
    match = re.search(r"/d/([\w-]+)", parts.path)
    return match[1] if match else parse_qs(parts.query).get("id", [""])[0]


def _direct(url: str) -> str:
    """Return the address of the file itself behind a link of Google Drive, others as they are."""
    if not _is_drive(url):
        return url
    if not _drive_id(url):
        raise UserError(f"{public(url)}: names no file of Google Drive; copy the link of a file, not of a folder")
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}/uc?{urlencode({'export': 'download', 'id': _drive_id(url)})}"


def _confirm(answer: requests.Response, page: Page) -> str | None:
    """Return the address behind the button of the page that asks whether a large file is wanted, None without one."""
    if page.form and "id" in page.inputs:
        address = f"{urljoin(answer.url, page.form)}?{urlencode(page.inputs)}"
    elif page.link:
        address = urljoin(answer.url, page.link)
    elif token := next((value for name, value in answer.cookies.items() if name.startswith("download_warning")), None):
        address = f"{answer.url}&{urlencode({'confirm': token})}"
    else:
        return None
    return address if _is_drive(address) else None


@dataclass
class Page(html.parser.HTMLParser):
    """Parser of a page of HTML: its title, a form for a download with its inputs, a link that confirms one."""

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


def _read_page(answer: requests.Response) -> Page:
    data = b""
    for chunk in _chunks(answer):
        data += chunk
        if len(data) >= PAGE_BYTES:
            break
    page = Page()
    page.feed(data[:PAGE_BYTES].decode("utf-8", "replace"))
    return page
