"""Files from the web: fetched once into the cache, whole or not at all, and checked whenever they are used.

A download that breaks off goes on where it stopped if the server lets it, now or the next time. Google Drive's links
work as they are shared: its page that asks whether a large file is really wanted is answered.
"""

from __future__ import annotations

import hashlib
import html.parser
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urldefrag, urlencode, urljoin, urlsplit

import requests
from requests.exceptions import ChunkedEncodingError
from tqdm import tqdm

from dnnlib.config import UserError
from dnnlib.util import write_atomically

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TIMEOUT = 20  # seconds without a byte from the server
ATTEMPTS = 5  # to go on after a break; without any progress there is no further one
CHUNK = 1 << 16  # bytes that are written at a time, and lost when a connection breaks
PAGE_BYTES = 1 << 20  # of HTML that are looked at
DRIVE_HOSTS = ("drive.google.com", "docs.google.com", "drive.usercontent.google.com")

Check = Callable[[Path], object]


def cache_dir() -> Path:
    """Return the folder for files that are fetched or computed once: DNNLIB_CACHE_DIR or ~/.cache/dnnlib."""
    given = os.environ.get("DNNLIB_CACHE_DIR")
    return Path(given) if given else Path.home() / ".cache" / "dnnlib"


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
    address, fragment = urldefrag(url)
    expected = _expected_digest(url, fragment)
    path = cached_path(url)
    record = path.with_name(f"{path.name}.json")
    if not path.is_file():
        download(address, path, check=lambda part: _check_digest(part, expected, url))
    digest = sha256_of_file(path)
    if record.is_file():
        recorded = _read_record(record)
        if recorded != digest:
            raise UserError(f"{path}: has changed since it was fetched; delete it, and it is fetched again")
    else:
        write_atomically(record, json.dumps({"url": address, "sha256": digest, "bytes": path.stat().st_size}) + "\n")
    _check_digest(path, expected, url, digest)
    return path


def _expected_digest(url: str, fragment: str) -> str:
    if not fragment:
        return ""
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{8,64})", fragment)
    if not match:
        raise UserError(f"{url}: after # only sha256=... is understood, with at least 8 digits")
    return match[1].lower()


def _check_digest(path: Path, expected: str, url: str, digest: str | None = None) -> None:
    found = digest or sha256_of_file(path)
    if not found.startswith(expected):
        raise UserError(f"{url}: the file's sha256 is {found}, another one")


def _read_record(record: Path) -> str:
    try:
        return str(json.loads(record.read_text())["sha256"])
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
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(part):
            if path.is_file():
                return
            print(f"Fetching {url} ...", file=sys.stderr, flush=True)
            _fetch_all(_direct(url), part)
            try:
                if check is not None:
                    check(part)
            except UserError:
                _discard(part)
                raise
            os.replace(part, path)
            _validator_of(part).unlink(missing_ok=True)
    except requests.Timeout:
        raise UserError(f"{url}: could not be fetched (no answer for {TIMEOUT} seconds)") from None
    except OSError as error:  # of the network, whose errors are OSErrors too, and of the disk
        raise UserError(f"{url}: could not be fetched ({str(error)[:200]})") from None


@contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Wait until no other process fetches this file; without fcntl nothing waits."""
    if fcntl is None:
        yield
        return
    lock = part.with_suffix(".lock")
    while True:
        with lock.open("w") as file:
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
            except (requests.ConnectionError, requests.Timeout, ChunkedEncodingError, _CutOffError):
                after = _size(part)
                if not _validator_of(part).is_file():
                    _discard(part)  # the server has no way to go on
                if attempt == ATTEMPTS or after <= before or not part.is_file():
                    raise


class _CutOffError(OSError):
    """Fewer bytes came than were announced."""


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _fetch_rest(session: requests.Session, url: str, part: Path) -> None:
    """Fetch what is missing in `part`. Raises OSError when it breaks off, UserError for an answer that is no file."""
    validator = _validator_of(part)
    start = _size(part) if validator.is_file() else 0
    headers = {"Accept-Encoding": "identity"}  # lengths are those of the file
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator.read_text()}
    answer = _answer(session, url, headers)
    with answer:
        goes_on = answer.status_code == 206
        start = start if goes_on else 0
        name = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if name and not name.startswith("W/"):
            validator.write_text(name)
        else:
            validator.unlink(missing_ok=True)
        announced = answer.headers.get("Content-Length")
        total = start + int(announced) if announced else None
        with (
            part.open("ab" if goes_on else "wb") as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, disable=None, leave=False) as progress,
        ):
            for chunk in answer.iter_content(CHUNK):
                file.write(chunk)
                progress.update(len(chunk))
    found = _size(part)
    if total is not None and found != total:
        raise _CutOffError(f"cut off after {found} of {total} bytes")


def _answer(session: requests.Session, url: str, headers: dict[str, str]) -> requests.Response:
    """Return the answer that is the file, not a page about it. Raises UserError when there is none."""
    for _ in range(3):
        answer = session.get(url, headers=headers, stream=True, timeout=TIMEOUT)
        if answer.status_code in (206, 416) and not _is_rest(answer, headers):  # 416: shorter than what is here
            answer.close()
            answer = session.get(url, headers={"Accept-Encoding": "identity"}, stream=True, timeout=TIMEOUT)
        if answer.status_code != 200 and not _is_rest(answer, headers):
            answer.close()
            raise UserError(f"{url}: the server answers {answer.status_code} {answer.reason}")
        if not answer.headers.get("Content-Type", "").lower().startswith("text/html"):
            return answer
        with answer:
            page = _read_page(answer)
        confirmed = _confirm(answer, page) if _is_drive(answer.url) else None
        if confirmed is None:
            title = f" ({page.title.strip()[:100]!r})" if page.title.strip() else ""
            raise UserError(f"{url}: the answer is a page of HTML{title}, not a file; is the link public and direct?")
        url = confirmed
    raise UserError(f"{url}: the server answers with one page of HTML after the other")


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
        raise UserError(f"{url}: names no file of Google Drive; copy the link of a file, not of a folder")
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
        self.within = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.within = tag
        values = {name: value or "" for name, value in attrs}
        if tag == "form" and not self.form:
            self.form = values.get("action", "")
        elif tag == "input" and "name" in values and self.form:
            self.inputs[values["name"]] = values.get("value", "")
        elif tag == "a" and "confirm=" in values.get("href", ""):
            self.link = self.link or values["href"]

    def handle_endtag(self, tag: str) -> None:
        self.within = ""

    def handle_data(self, data: str) -> None:
        if self.within == "title":
            self.title += data


def _read_page(answer: requests.Response) -> Page:
    page = Page()
    data = next(answer.iter_content(PAGE_BYTES), b"")
    page.feed(data.decode("utf-8", "replace"))
    return page
