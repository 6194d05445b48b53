"""Hostile networks: malicious servers, decompression bombs, planted links, secrets in URLs, control characters."""

from __future__ import annotations

import gc
import gzip
import io
import json
import os
import socket
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unicodedata import bidirectional, category
from urllib.parse import quote, urlsplit

import pytest
from click.testing import CliRunner, Result
from conftest import PATIENCE, launch_as
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from web import Site, answering

import calc_metrics
import dataset_tool
import generate
import legacy
import train
from dnnlib import download
from dnnlib.config import UserError
from dnnlib.download import cache_dir, cached_path, fetch
from dnnlib.screen import Screen, printable, public, shown, without_secrets
from dnnlib.util import TeeLog, partial_path, write_atomically
from torch_utils import custom_ops, distributed
from training.snapshots.transfer import Origin

DATA = bytes(range(256)) * 40
OK = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as site:
        site.files["/net.pkl"] = DATA
        yield site


def run(command: Any, *arguments: str) -> Result:
    return CliRunner().invoke(command, arguments, color=True)


def refused(command: Any, *arguments: str) -> str:
    """Return the one-line error message of a failing command."""
    result = run(command, *arguments)
    assert (result.exit_code, type(result.exception)) == (2, SystemExit), result.output
    errors = [line for line in result.stderr.splitlines() if not line.startswith("Fetching ")]
    assert len(errors) == 1, result.output
    return errors[0]


# Servers.

LENGTHS = ["12abc", "1e9", "²", "٣", "9" * 5000, "-1", "+5", "0x10", "1_0", " ", "1.0", "nan", "1" + "0" * 15]


@pytest.mark.parametrize("length", LENGTHS)
def test_invalid_content_lengths_are_refused(length: str) -> None:
    head = b"Content-Length: " + length.encode() + b"\r\n\r\n"
    with answering(OK + head + b"12345") as url:
        line = refused(legacy.main, "info", f"{url}/net.pkl")
    assert line.startswith(f"Error: {url}/net.pkl: ")
    assert len(line) < 300
    assert not list(cache_dir().rglob("*.pkl"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_contradictory_content_lengths_are_refused() -> None:
    """urllib3 refuses them and leaves the connection to the garbage collector."""
    for lengths in (b"Content-Length: 5, 6\r\n", b"Content-Length: 5\r\nContent-Length: 6\r\n"):
        with answering(OK + lengths + b"\r\n12345") as url:
            assert "could not be fetched" in refused(legacy.main, "info", f"{url}/net.pkl")
    gc.collect()


HEADS: dict[str, bytes] = {
    "twice": OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n12345",
    "gzip": OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(1 << 20)),
    "several encodings": OK + b"Content-Encoding: identity, br\r\n\r\n12345",
    "an encoding with an escape sequence": OK + b"Content-Encoding: \x1b[31mgzip\r\n\r\n12345",
    "too large": OK + b"Content-Length: 99999999999999\r\n\r\n12345",
    "a redirection to an invalid URL": b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\n\r\n",
    "a redirection to a file": b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
    "a redirection to an FTP server": b"HTTP/1.1 302 Found\r\nLocation: ftp://u:s3cret@h/x\r\n\r\n",
    "a redirection to a bad port": b"HTTP/1.1 302 Found\r\nLocation: http://h:99999/x\r\n\r\n",
    "a redirection without a host": b"HTTP/1.1 302 Found\r\nLocation: http:///x?s3cret\r\n\r\n",
    "a redirection to itself": b"HTTP/1.1 302 Found\r\nLocation: /net.pkl\r\n\r\n",
    "a reason phrase in colour": b"HTTP/1.1 404 \x1b[31mNo\x07\r\n\r\n",
    "a long reason phrase": b"HTTP/1.1 500 " + b"x" * 5000 + b"\r\n\r\n",
    "an invalid status": b"HTTP/1.1 99999 OK\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "nothing": b"",
    "an invalid chunk size": OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n12345",
    "a truncated chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\n12",
    "too many headers": OK + b"".join(b"A%d: x\r\n" % i for i in range(200)) + b"\r\n",
    "a very long header": OK + b"A: " + b"x" * 70_000 + b"\r\n\r\n",
    "a page with a title in colour": OK + b"Content-Type: text/html\r\n\r\n<title>\x1b[31mHi\xe2\x80\xae</title>",
}


@pytest.mark.parametrize("kind", HEADS)
def test_invalid_responses_are_refused_in_one_line(kind: str) -> None:
    with answering(HEADS[kind]) as url:
        line = refused(legacy.main, "info", f"{url}/net.pkl")
    assert line.startswith(f"Error: {url}/net.pkl: ")
    assert len(line) < 500
    assert "s3cret" not in line
    assert line == printable(line)
    assert not list(cache_dir().rglob("*.pkl"))


def test_downloads_have_a_size_limit(monkeypatch: pytest.MonkeyPatch, site: Site) -> None:
    monkeypatch.setattr(download, "MAX_BYTES", len(DATA))
    assert fetch(f"{site.url}/net.pkl").read_bytes() == DATA
    monkeypatch.setattr(download, "MAX_BYTES", len(DATA) - 1)
    with pytest.raises(
        UserError, match=rf"has {len(DATA)} bytes \(Content-Length\), more than the limit of {len(DATA) - 1}"
    ):
        fetch(f"{site.url}/net.pkl?2")
    with (
        answering(OK + b"Connection: close\r\n\r\n" + DATA) as url,
        pytest.raises(UserError, match=f"exceeds the download limit of {len(DATA) - 1} bytes"),
    ):
        fetch(f"{url}/net.pkl")


@pytest.mark.parametrize("head", [OK + b"Content-Length: 30000\r\n\r\n", b""])
def test_a_trickling_server_is_abandoned(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server trickles the body or the headers; each byte arrives well before the read timeout."""
    monkeypatch.setattr(download, "PACE_SECONDS", 0.3)
    monkeypatch.setattr(download, "RESPONSE_SECONDS", PATIENCE if head else 0.3)
    content = (head or OK + b"A: ") + b"x" * 30_000  # one minute
    reason = "which is too slow" if head else "no complete response after 0.3 seconds"
    with answering(content, pause=0.002) as url, pytest.raises(UserError, match=f"could not be fetched .*{reason}"):
        fetch(f"{url}/net.pkl")


# The cache.

READ = ["net.pkl", "net.pkl.json"]
WRITTEN = [".net.pkl.part", ".net.pkl.lock", ".net.pkl.etag"]
REMEDY = "; remove it, or set DNNLIB_CACHE_DIR to another folder$"


def plant(kind: str, place: Path, victim: Path) -> None:
    """Replace a cache file by a link, a pipe or a folder."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        place.symlink_to(victim)
    elif kind == "dangling link":
        place.symlink_to(victim.with_name("new"))
    elif kind == "hard link":
        place.hardlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in READ + WRITTEN for kind in ("dangling link", "pipe", "folder")]
    + [(name, kind) for name in WRITTEN for kind in ("link", "hard link")],
)
def test_planted_cache_files_are_not_used(name: str, kind: str, site: Site, tmp_path: Path) -> None:
    url = f"{site.url}/net.pkl"
    (tmp_path / "victim").write_bytes(b"precious")
    plant(kind, cached_path(url).with_name(name), tmp_path / "victim")
    with pytest.raises(UserError, match=f"{name}: is (a link or )?not a file.*{REMEDY}"):
        fetch(url)
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", READ + WRITTEN)
def test_links_of_other_users_are_not_followed(
    name: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{site.url}/net.pkl"
    content = fetch(url).with_name(name).read_bytes() if name in READ else b"precious"
    cached_path(url).with_name(name).unlink(missing_ok=True)
    (tmp_path / "victim").write_bytes(content)
    plant("link", cached_path(url).with_name(name), tmp_path / "victim")
    if name in WRITTEN:
        cached_path(url).unlink(missing_ok=True)
    monkeypatch.setattr("os.getuid", lambda: 54321)
    with pytest.raises(UserError, match=f"{name}: is a link owned by another user, .*{REMEDY}"):
        fetch(url)
    assert (tmp_path / "victim").read_bytes() == content


@pytest.mark.parametrize("kind", ["link", "hard link"])
def test_cached_files_may_be_links(kind: str, site: Site, tmp_path: Path) -> None:
    """Cache files may be links to another disk, or hard links made by `cp -al`."""
    for name in READ:
        path = fetch(f"{site.url}/net.pkl").with_name(name)
        plant(kind, path, path.rename(tmp_path / name))
    assert fetch(f"{site.url}/net.pkl").read_bytes() == DATA
    assert len(site.requests) == 1


@pytest.mark.parametrize("depth", [0, 1])
def test_folders_may_be_links_of_their_owner(
    depth: int, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small home directories need links such as downloads -> /scratch."""
    url = f"{site.url}/net.pkl"
    folder = [*cached_path(url).parents][depth]
    (tmp_path / "elsewhere").mkdir()
    plant("link", folder, tmp_path / "elsewhere")
    with monkeypatch.context() as patch:
        patch.setattr("os.getuid", lambda: 54321)
        with pytest.raises(UserError, match=f"{folder}: is a link owned by another user, .*{REMEDY}"):
            fetch(url)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert fetch(url).read_bytes() == DATA
    assert len(list((tmp_path / "elsewhere").rglob("*.pkl"))) == 1
    monkeypatch.setattr("os.getuid", lambda: 54321)
    with pytest.raises(UserError, match="is a link owned by another user"):
        fetch(url)


def test_a_cache_is_private_to_its_user(site: Site, tmp_path: Path) -> None:
    """Files are private at any umask, including the files of an interrupted download."""
    cache = tmp_path / "cache"
    before = os.umask(0)
    try:
        site.breaks["/net.pkl"] = [1000, 0]
        with pytest.raises(UserError):
            fetch(f"{site.url}/net.pkl")
        assert {path.stat().st_mode & 0o777 for path in cache.rglob(".*")} == {0o600}
        fetch(f"{site.url}/net.pkl")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [cache, *cache.rglob("*")]}
    assert {mode for name, mode in modes.items() if name.startswith("net.pkl")} == {0o600}
    assert {mode for name, mode in modes.items() if not name.startswith("net.pkl")} == {0o700}
    assert len(modes) == 5


def test_an_atomic_write_does_not_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    partial_path(tmp_path / "file").symlink_to(tmp_path / "victim")
    write_atomically(tmp_path / "file", "new")
    assert ((tmp_path / "victim").read_bytes(), (tmp_path / "file").read_text()) == (b"precious", "new")


# URLs.

SECRETS = {
    "https://user:s3cret@example.org/net.pkl": "https://example.org/net.pkl",
    "https://s3cret@example.org/net.pkl": "https://example.org/net.pkl",
    "https://user:s3@s3cret@example.org/net.pkl": "https://example.org/net.pkl",
    "https://user:x/s3cret@example.org/net.pkl": "https://example.org/net.pkl",
    "https://example.org/net.pkl?X-Amz-Signature=s3cret&a=b": "https://example.org/net.pkl",
    "https://example.org?s3cret": "https://example.org",
    "https://example.org/net.pkl#s3cret": "https://example.org/net.pkl",
    "https://u:s3cret@example.org:8080/a@b/c.pkl?s3cret#sha256=0123abcd": "https://example.org:8080/a@b/c.pkl#sha256=0123abcd",
    "s3://key:s3cret@bucket/net.pkl": "s3://bucket/net.pkl",
    "HTTPS://U:s3cret@Example.org/": "HTTPS://Example.org/",
    "http://u:s3cret@[::1]:80/x?s3cret": "http://[::1]:80/x",
    "http://u:s3cret@[::1": "http://[::1",
    "http:/u:s3cret@example.org/x?s3cret": "http:/example.org/x",
    "https://u:s3cret@example.org/x?s3cret#cuda-memory": "https://example.org/x#cuda-memory",
    "https://example.org/x#access_token=s3cret": "https://example.org/x",
    "https://u:s3cret#words@example.org/x": "https://example.org/x",
}
PLAIN = [
    "https://example.org/net.pkl",
    "https://example.org/docs/stable/x.html#torch.nn.Module",
    "https://example.org/x#saving-loading_models",
    "http://localhost:8000/",
    "http://[::1]:80/a@b",
    "runs/a?b#c@d",
    "x",
    "",
    "a@b",
    "c:\\x",
]


@pytest.mark.parametrize("address", SECRETS)
def test_secrets_in_urls_are_redacted(address: str) -> None:
    expected = SECRETS[address]
    assert public(address) == expected
    assert Origin(source=address).source == expected
    for sentence in (
        "{}: could not be read",
        "see ({}), or not",
        '"{}"',
        "'{}': x",
        "--resume={}",
        "a {}",
        "<{}>\n",
        "{}.",
    ):
        assert without_secrets(sentence.format(address)) == sentence.format(expected)


@pytest.mark.parametrize("text", PLAIN)
def test_text_without_secrets_is_unchanged(text: str) -> None:
    assert public(text) == without_secrets(text) == text


WORDS = st.text("abcXYZ019._~-%$&+,;=", min_size=1, max_size=8)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(WORDS, WORDS, WORDS, st.booleans(), st.booleans())
def test_urls_are_redacted_as_a_url_parser_reads_them(
    host: str, path: str, secret: str, has_user: bool, has_query: bool
) -> None:
    host, secret = quote(host, safe="").replace("%", "").lower() + "h", f"S3CRET{secret}"
    address = f"https://{f'u:{secret}@' if has_user else ''}{host}/{path}{f'?a={secret}' if has_query else ''}"
    parts = urlsplit(address)
    assert public(address) == f"https://{parts.hostname}{parts.path}"
    assert "S3CRET" not in shown(f"Error: {address}: no ({address})\n")


REFUSALS: list[Callable[[str], tuple[Any, list[str]]]] = [
    lambda url: (legacy.main, ["info", url]),
    lambda url: (legacy.main, ["convert", f"--source={url}", "--dest=made.pkl"]),
    lambda url: (generate.main, [f"--network={url}", "--seeds=0", "--outdir=out", "--device=cpu"]),
    lambda url: (calc_metrics.main, [f"--network={url}", "--metrics=swd20", "--device=cpu"]),
    lambda url: (calc_metrics.main, ["--network=x", f"--detector={url}"]),
    lambda url: (train.main, ["--outdir=runs", f"--data={url}"]),
    lambda url: (dataset_tool.main, [f"--source={url}", "--dest=made.zip"]),
    lambda url: (train.main, ["--outdir=runs", "--data=x.zip", f"--cfg={url}"]),
    lambda url: (generate.main, [f"--{url}"]),
]


@pytest.mark.parametrize("number", range(len(REFUSALS)))
def test_no_command_prints_the_secrets_of_a_url(
    number: int, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cases: a refusing server, an unreachable server, an unknown host name."""
    monkeypatch.chdir(tmp_path)
    for base in (site.url, "http://127.0.0.1:9", "http://no-such-host.invalid", "http://[::1"):
        url = f"{base.replace('//', '//user:s3cret@')}/missing.pkl?signature=s3cret"
        command, arguments = REFUSALS[number](url)
        result = run(command, *arguments)
        assert (result.exit_code, type(result.exception)) == (2, SystemExit), result.output
        assert "s3cret" not in result.output
        assert "missing.pkl" in result.output
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"s3cret" not in kept


def test_cache_records_hold_urls_without_secrets(site: Site) -> None:
    url = f"{site.url.replace('//', '//user:s3cret@')}/net.pkl?signature=s3cret"
    path = fetch(url)
    record = json.loads(path.with_name("net.pkl.json").read_text())
    assert (path.read_bytes(), record["url"]) == (DATA, f"{site.url}/net.pkl")
    assert site.requests == [("/net.pkl?signature=s3cret", None)]  # the request itself keeps the full URL


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1", "http://h:x/y", "http://h:99999/y", "http://:80/", "https://?x"]
)
def test_malformed_urls_are_refused(url: str) -> None:
    assert "invalid URL: no host, or a bad port" in refused(legacy.main, "info", url)


# Names on a terminal.

NASTY = [
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "a\rb",
    "\x08\x08",
    "\x9b31m",
    "\u202egnp.exe",
    "a\x7f",
    "\u2028b",
    "a\x00b",
]


# Characters that set the direction of the following text (Unicode, annex 9).
DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.text())
@example("".join(map(chr, range(0x3000))))
@example("".join(NASTY))
@example("\x1b\x1b[31m[31m")
@example("\r\x1b[2K\r")
@example("\r\r\n")
def test_terminal_control_sequences_are_escaped(text: str) -> None:
    body = shown(text).strip("\r")
    assert not [
        c for c in body if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or c in "\u202e\u2028\u2066"
    ]
    assert not {category(c) for c in printable(text)} & {"Cc", "Zl", "Zp", "Cs"}
    assert not {bidirectional(c) for c in printable(text)} & DIRECTIONS
    if text.isascii() and text.isprintable() and "://" not in text:
        assert shown(text) == printable(text) == text


@pytest.mark.parametrize("name", [name for name in NASTY if "\0" not in name])
def test_commands_escape_control_characters_in_names(name: str, tmp_path: Path) -> None:
    folder = tmp_path / f"{name}folder"
    folder.mkdir()
    (folder / f"{name}.pkl").write_bytes(b"no snapshot")
    (folder / f"{name}.png").write_bytes(b"no image")
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
        archive.writestr(f"{name}0.png", picture.getvalue())
        archive.writestr(f"{name}1.png", picture.getvalue()[:40])
    for command, *arguments in (
        (legacy.main, "info", str(folder / f"{name}.pkl")),
        (generate.main, f"--network={folder / name}.pkl", "--seeds=0", f"--outdir={tmp_path / 'o'}"),
        (generate.main, f"--network={folder}", "--seeds=0", f"--outdir={tmp_path / 'o'}"),
        (train.main, f"--data={folder}", f"--outdir={tmp_path / name}", "-n"),
        (train.main, f"--data={folder / name}.zip", f"--outdir={tmp_path / 'o'}", f"--resume={name}"),
        (dataset_tool.main, f"--source={folder / name}.zip", f"--dest={tmp_path / 'made.zip'}", "--workers=1"),
        (dataset_tool.main, f"--source={folder}", f"--dest={tmp_path / 'made'}", "--workers=1", "--skip-bad"),
        (dataset_tool.main, name),
    ):
        result = run(command, *arguments)
        assert result.exit_code in (1, 2), result.output
        assert isinstance(result.exception, SystemExit)
        assert result.output.replace("\n", "").replace("\r", "").isprintable(), (command, result.output)


def test_library_output_to_a_terminal_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    r"""Colours of W&B, cursor movement of nested tqdm bars, and lines ending with \r\n."""
    stream = Screen(sys.stdout)
    stream.write("\x1b[34mwandb\x1b[0m: Run \x1b[1;33mx\x1b[m\n")
    for text in ("\n", "\r50%", "\x1b[A", "\x1b[?25l"):
        stream.write(text)
    stream.writelines(["A\r\n", "B\r\nC\x07\r\n"])
    assert capsys.readouterr().out == "wandb: Run x\n\n\r50%A\nB\nC\\x07\n"


def test_the_log_equals_the_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "Starting from https://u:s3cret@h/x?s3cret \x1b[31mred\x07"
    stream = Screen(sys.stdout)
    print(text, file=stream)
    with TeeLog(tmp_path / "log.txt"):
        print(text)
    expected = "Starting from https://h/x red\\x07\n"
    assert (tmp_path / "log.txt").read_text() == expected
    assert capsys.readouterr().out.splitlines()[0] + "\n" == expected
    assert not hasattr(stream, "buffer")


# The environment.

GOOD = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
STRANGE = ["", "abc", "-1", "1.5", "²", "1e9", "9" * 5000, "7777777", " 1", "0x1", None]


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("value", STRANGE)
def test_invalid_launcher_variables_are_named(name: str, value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_as(monkeypatch)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for function in (distributed.launched_world_size, distributed.launched_rank):
        with pytest.raises(UserError, match=rf"^{name}( is missing|=.*must be a whole number)") as caught:
            function()
        assert len(str(caught.value)) < 250


def test_a_missing_home_is_reported_with_the_variable_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run as a user without an entry in the password file, as in containers."""
    for name in ("HOME", "DNNLIB_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 54321)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"HOME is not set, .*: set HOME, or TORCH_EXTENSIONS_DIR to a folder"):
        custom_ops.extensions_folder()
    for arguments in (
        ["info", "http://127.0.0.1:9/x.pkl"],
        ["convert", "--source=http://127.0.0.1:9/x", "--dest=x.pkl"],
    ):
        line = refused(legacy.main, *arguments)
        assert line.startswith("Error: HOME is not set, and this user has no entry in the password file: set HOME, or ")
        assert line.endswith("DNNLIB_CACHE_DIR to a folder")
    assert "no such file" in refused(legacy.main, "info", "~/x.pkl")
    assert not list(tmp_path.iterdir())


def test_a_local_rank_alone_is_checked_by_every_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOCAL_RANK", "abc")
    with pytest.raises(UserError, match="LOCAL_RANK=abc: this environment variable must be a whole number"):
        distributed.choose_device()


# Connections.


def listening(pids: list[int]) -> list[tuple[str, str]]:
    """Return the hexadecimal addresses on which processes listen, with the /proc file of each."""
    links = [f"/proc/{pid}/fd/{fd}" for pid in pids for fd in os.listdir(f"/proc/{pid}/fd")]
    inodes = {os.readlink(link)[8:-1] for link in links if os.path.exists(link) or os.path.islink(link)}
    found = []
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.append((table, fields[1].partition(":")[0]))
    return found


def in_two_processes(folder: Path, data: Path) -> None:
    distributed.barrier()
    found = listening([os.getpid(), os.getppid()]) if Path("/proc/net/tcp").exists() else []
    (folder / str(distributed.rank())).write_text(json.dumps([found, os.environ["GLOO_SOCKET_IFNAME"]]))
    distributed.barrier()


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc/net/tcp to list listening sockets")
def test_processes_of_one_machine_listen_on_loopback_only(together: Path) -> None:
    """The launcher and its workers reach each other: they pass a barrier."""
    for rank in range(2):
        found, interface = json.loads((together / "test_hostile_web" / str(rank)).read_text())
        assert found
        assert {tuple(address) for address in found} <= {("tcp", "0100007F"), ("tcp6", "0" * 24 + "01000000")}
        assert interface.startswith("lo")
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    with socket.create_server(("", 0)) as server:  # the check detects a socket that listens on all interfaces
        assert ("tcp", "00000000") in listening([os.getpid()])
        assert server.getsockname()[1]
