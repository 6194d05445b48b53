"""The site of the documentation: it builds, its links resolve, it loads nothing from other hosts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import PATIENCE

from dnnlib.images import open_image

pytest.importorskip("material", reason="needs mkdocs-material")

ROOT = Path(__file__).parent.parent
COUNTED = {"h1", "h2", "h3", "h4", "table", "tr", "ul", "ol", "li", "pre", "img"}


@dataclass
class Html(HTMLParser):
    """Parsed page: ids, targets of links, other loaded addresses, and the tags of its article."""

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    classes: set[str] = field(default_factory=set)
    tags: Counter[str] = field(default_factory=Counter)
    in_article: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        self.classes |= {*values.get("class", "").split()}
        self.in_article |= tag == "article"
        self.tags[tag] += self.in_article
        if "href" in values:
            (self.links if tag == "a" else self.loaded).append(values["href"])
        self.loaded += [values[name] for name in ("src", "srcset", "data", "poster") if name in values]
        self.images += [values["src"]] if tag == "img" else []

    def handle_endtag(self, tag: str) -> None:
        self.in_article &= tag != "article"


def parse(text: str) -> Html:
    page = Html()
    page.feed(text)
    return page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={folder}"]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (built.returncode, built.stderr) == (0, "")
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Html]:
    return {file: parse(file.read_text()) for file in site.rglob("*.html")}


def missing(page: Path, address: str, site: Path, pages: dict[Path, Html]) -> bool:
    """Return whether the file or the anchor of a relative address does not exist."""
    parts = urlsplit(address)
    path = unquote(parts.path)
    target = (site / path[1:] if path.startswith("/") else page.parent / path) if path else page
    target = (target / "index.html" if target.is_dir() else target).resolve()
    if not target.is_file():
        return True
    return bool(parts.fragment) and target in pages and unquote(parts.fragment) not in {*pages[target].ids, "__"}


def test_every_link_and_anchor_of_the_site_resolves(site: Path, pages: dict[Path, Html]) -> None:
    resolved = 0
    for file, page in pages.items():
        local = [address for address in page.links + page.loaded if not urlsplit(address).scheme]
        broken = [address for address in local if missing(file, address, site, pages)]
        assert broken == [], file.relative_to(site)
        resolved += len(local)
    assert resolved > 3000


def test_a_broken_link_or_anchor_is_detected(site: Path, pages: dict[Path, Html]) -> None:
    file = site / "tutorial.html"
    assert not missing(file, "running.html#watching-a-run", site, pages)
    for address in ("running.html#watching", "no-such-page.html", "#6-result", "images/none.png"):
        assert missing(file, address, site, pages), address


def test_every_image_of_the_site_opens(site: Path, pages: dict[Path, Html]) -> None:
    images = {(file.parent / unquote(source)).resolve() for file, page in pages.items() for source in page.images}
    assert {"samples.png", "progress.png", "play.png", "sheet.png"} <= {image.name for image in images}
    for image in images:
        with open_image(image.read_bytes()) as opened:
            opened.load()


def test_the_site_loads_nothing_from_other_hosts(site: Path, pages: dict[Path, Html]) -> None:
    """Material's scripts name hosts of diagrams and repositories, and load them only for the classes below."""
    for file, page in pages.items():
        assert [address for address in page.loaded if urlsplit(address).netloc] == [], file
        assert not page.classes & {"mermaid", "md-source"}, file
    styles = [*site.rglob("*.css")]
    assert {"site.css", "home.css"} <= {style.name for style in styles}
    for style in styles:
        text = style.read_text()
        assert not re.search(r"@import|url\(\s*[\"']?(https?:)?//", text), style
    assert (site / "search" / "search_index.js").read_text().startswith("var __index = ")


def test_the_navigation_has_the_groups_of_the_index(pages: dict[Path, Html], site: Path) -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    groups = [name.strip().capitalize() for name in re.findall(r"^\| ([a-z ]+)\| \|$", index, re.MULTILINE)]
    front = (site / "index.html").read_text()
    tabs = re.findall(r'<a href="[^"]*" class="md-tabs__link">\s*(.*?)\s*</a>', front, re.DOTALL)
    assert tabs == ["Home", *groups]
    listed = re.findall(r"^\| \[.*?\]\(([\w-]+)\.md\)", index, re.MULTILINE)
    assert len(listed) > 20
    assert {f"{name}.html" for name in listed} <= {*pages[site / "index.html"].links}


def test_the_site_renders_the_markdown_as_github_does(site: Path, pages: dict[Path, Html]) -> None:
    """The same numbers of headings, tables, rows, lists, code blocks and images as by markdown-it."""
    renderer = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    sources = {f"{file.stem}.html": file for file in (ROOT / "docs").glob("*.md") if file.stem != "README"}
    sources |= {"overview.html": ROOT / "README.md", "contents.html": ROOT / "docs" / "README.md"}
    sources |= {"changelog.html": ROOT / "CHANGELOG.md", "first-change.html": ROOT / "CONTRIBUTING.md"}
    for name, source in sources.items():
        expected = parse(f"<article>{renderer.render(source.read_text())}</article>")
        counts = [{tag: page.tags[tag] for tag in COUNTED} for page in (pages[site / name], expected)]
        assert counts[0] == counts[1], name


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_the_search_works_in_pages_opened_as_files(site: Path, tmp_path: Path) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    flags += ["--virtual-time-budget=20000", f"{(site / 'index.html').as_uri()}?q=rendezvous"]
    shown = subprocess.run(["chromium", *flags], capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    assert re.search(r'href="[^"]*running\.html\?h=rendezvous', shown)
