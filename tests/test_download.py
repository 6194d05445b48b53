"""Downloads from a server in a thread: resume, refusals, checksums, cache, Google Drive confirmations."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from conftest import PATIENCE
from web import Site

from dnnlib import download
from dnnlib.config import UserError
from dnnlib.download import cached_path, fetch, is_url

DATA = bytes(range(256)) * 40
HTML = {"Content-Type": "text/html; charset=utf-8"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "CHUNK", 100)
    return tmp_path / "cache"


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as site:
        site.files["/models/net.pkl"] = DATA
        yield site


@pytest.fixture
def drive(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Make the server act as Google Drive: a page at /uc, the file at /download."""
    monkeypatch.setattr(download, "DRIVE_HOSTS", ("127.0.0.1",))
    site.files = {"/download": DATA, "/uc": DATA}
    site.confirm = "t0ken"
    return site


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_downloaded_once_with_its_checksum(site: Site, cache: Path) -> None:
    url = f"{site.url}/models/net.pkl"
    path = fetch(url)
    assert path.read_bytes() == DATA
    assert (path.name, path.parent.parent) == ("net.pkl", cache / "downloads")
    assert names(path.parent) == ["net.pkl", "net.pkl.json"]
    record = json.loads(path.with_name("net.pkl.json").read_text())
    assert record == {"url": url, "sha256": hashlib.sha256(DATA).hexdigest(), "bytes": len(DATA)}
    assert fetch(url) == path == cached_path(url)
    assert len(site.requests) == 1
    path.write_bytes(DATA[1:])
    with pytest.raises(UserError, match="changed since it was fetched"):
        fetch(url)


def test_a_checksum_in_the_url_is_verified(site: Site) -> None:
    url, digest = f"{site.url}/models/net.pkl", hashlib.sha256(DATA).hexdigest()
    with pytest.raises(UserError, match=f"the file's sha256 is {digest}"):
        fetch(f"{url}#sha256=00000000")
    assert names(cached_path(url).parent) == []
    assert fetch(f"{url}#sha256={digest}") == fetch(f"{url}#sha256={digest[:8]}") == fetch(url)
    with pytest.raises(UserError, match="the file's sha256"):
        fetch(f"{url}#sha256=00000000")
    with pytest.raises(UserError, match="only sha256="):
        fetch(f"{url}#md5=1234")


def test_an_interrupted_download_is_resumed(site: Site) -> None:
    site.breaks["/models/net.pkl"] = [1000, 2000]
    assert fetch(f"{site.url}/models/net.pkl").read_bytes() == DATA
    assert [asked for _, asked in site.requests] == [None, "bytes=1000-", "bytes=3000-"]


def test_a_wrong_byte_range_is_refused(site: Site) -> None:
    url = f"{site.url}/models/net.pkl"
    site.breaks["/models/net.pkl"] = [1000]
    site.skips = 10
    assert fetch(url).read_bytes() == DATA
    assert [asked for _, asked in site.requests] == [None, "bytes=1000-", None]
    site.pages["/part.pkl"] = (206, {"Content-Range": "bytes 5-9/10"}, b"56789")
    with pytest.raises(UserError, match=r"part\.pkl: the server returned 206 Partial Content"):
        fetch(f"{site.url}/part.pkl")


def test_a_download_is_resumed_by_the_next_call(site: Site) -> None:
    url = f"{site.url}/models/net.pkl"
    site.breaks["/models/net.pkl"] = [1000, 0]
    with pytest.raises(UserError, match=r"net\.pkl: could not be fetched"):
        fetch(url)
    assert names(cached_path(url).parent) == [".net.pkl.etag", ".net.pkl.part"]
    assert fetch(url).read_bytes() == DATA
    assert site.requests[-1][1] == "bytes=1000-"
    assert names(cached_path(url).parent) == ["net.pkl", "net.pkl.json"]


def test_a_file_changed_on_the_server_is_downloaded_again(site: Site) -> None:
    url = f"{site.url}/models/net.pkl"
    site.breaks["/models/net.pkl"] = [1000, 0]
    with pytest.raises(UserError):
        fetch(url)
    site.files["/models/net.pkl"] = DATA[::-1]
    assert fetch(url).read_bytes() == DATA[::-1]


def test_parts_without_a_validator_are_not_joined(site: Site) -> None:
    url = f"{site.url}/models/net.pkl"
    site.has_etags = False
    site.breaks["/models/net.pkl"] = [1000]
    with pytest.raises(UserError, match="could not be fetched"):
        fetch(url)
    assert names(cached_path(url).parent) == []
    assert fetch(url).read_bytes() == DATA


def test_responses_that_are_not_files_are_refused(site: Site, cache: Path) -> None:
    site.pages["/login"] = (200, HTML, b"<html><title>Sign in &amp; wait</title></html>")
    with pytest.raises(UserError, match=r"/login: the response is an HTML page \('Sign in & wait'\), not a file"):
        fetch(f"{site.url}/login")
    with pytest.raises(UserError, match=r"missing\.pkl: the server returned 404"):
        fetch(f"{site.url}/missing.pkl")
    site.server.server_close()
    with pytest.raises(UserError, match="could not be fetched"):
        fetch("http://127.0.0.1:9/net.pkl")
    assert not list(cache.rglob("*.pkl"))


def test_an_unresponsive_server_is_reported(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.2)

    given_up = threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        assert given_up.wait(PATIENCE)

    monkeypatch.setattr(site, "answer", answer)
    try:
        with pytest.raises(UserError, match=r"could not be fetched \(no response for 0\.2 seconds\)"):
            fetch(f"{site.url}/models/net.pkl")
    finally:
        given_up.set()


def test_redirections_are_followed(site: Site) -> None:
    site.pages["/moved"] = (302, {"Location": f"{site.url}/models/net.pkl"}, b"")
    assert fetch(f"{site.url}/moved").read_bytes() == DATA


def test_processes_share_one_download(site: Site) -> None:
    url = f"{site.url}/models/net.pkl"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        paths = pool.map(fetch, [url] * 4, chunksize=1)
    assert {path.read_bytes() for path in paths} == {DATA}
    assert len(site.requests) == 1


LINKS = ["/file/d/FILE/view?usp=sharing", "/open?id=FILE", "/uc?id=FILE&export=download", "/uc?id=FILE"]


@pytest.mark.parametrize("link", LINKS)
def test_drive_small_files_download_directly(drive: Site, link: str) -> None:
    path = fetch(drive.url + link)
    assert path.read_bytes() == DATA
    assert path.name == "FILE.pkl"
    assert drive.requests[-1][0] == "/uc?export=download&id=FILE"


def test_drive_confirmation_forms_are_submitted(drive: Site) -> None:
    form = (
        '<html><title>Google Drive - Virus scan warning</title><form id="download-form" method="get" '
        f'action="{drive.url}/download"><input type="hidden" name="id" value="FILE">'
        '<input type="hidden" name="export" value="download"><input type="hidden" name="confirm" value="t0ken">'
        '<input type="hidden" name="uuid" value="1-2-3"></form></html>'
    )
    drive.pages["/uc"] = (200, HTML, form.encode())
    assert fetch(f"{drive.url}/file/d/FILE/view").read_bytes() == DATA
    assert drive.requests[-1][0] == "/download?id=FILE&export=download&confirm=t0ken&uuid=1-2-3"


def test_drive_confirmation_links_are_followed(drive: Site) -> None:
    page = b'<html><a href="/uc?export=download&amp;confirm=t0ken&amp;id=FILE">Download anyway</a></html>'
    drive.pages["/uc"] = (200, HTML, page)
    assert fetch(f"{drive.url}/open?id=FILE").read_bytes() == DATA


def test_drive_confirmation_cookies_are_used(drive: Site) -> None:
    drive.pages["/uc"] = (200, HTML | {"Set-Cookie": "download_warning_13=t0ken"}, b"<html>Really?</html>")
    assert fetch(f"{drive.url}/open?id=FILE").read_bytes() == DATA


def test_drive_refusals_are_reported(drive: Site) -> None:
    drive.pages["/uc"] = (200, HTML, b"<html><title>Google Drive - Quota exceeded</title></html>")
    with pytest.raises(UserError, match="Quota exceeded"):
        fetch(f"{drive.url}/open?id=FILE")
    with pytest.raises(UserError, match="is not a Google Drive file"):
        fetch(f"{drive.url}/drive/my-drive")
    elsewhere = b'<html><form action="http://localhost/x"><input name="id" value="FILE"></form></html>'
    drive.pages["/uc"] = (200, HTML, elsewhere)
    with pytest.raises(UserError, match="an HTML page"):
        fetch(f"{drive.url}/open?id=FILE")
    drive.confirm = "never"
    again = b'<html><a href="/uc?export=download&amp;confirm=t0ken&amp;id=FILE">Download anyway</a></html>'
    drive.pages["/uc"] = (200, HTML, again)
    with pytest.raises(UserError, match="keeps returning HTML pages"):
        fetch(f"{drive.url}/open?id=FILE")


def test_urls_are_recognised() -> None:
    assert is_url("https://example.org/a.pkl")
    assert not is_url("a.pkl")
    assert not is_url(Path("https://example.org"))
    assert not is_url("s3://bucket/a.pkl")
    assert cached_path("https://example.org/a%20b.pkl?x=1").name == "a_b.pkl"
    assert cached_path("https://example.org/..").name == "file"
    assert os.sep not in cached_path("https://example.org/a%2Fb").name
