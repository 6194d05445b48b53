"""Hooks of MkDocs that build the site from Markdown written for the repository.

They take the navigation from docs/README.md, add pages outside docs/ (PAGES), and show every linked source file as a
page, because the project has no public address to link to.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
PAGES = {  # file of the repository -> page of the site
    "docs/theme/home.md": "index.md",
    "docs/README.md": "contents.md",
    "docs/colab.ipynb": "notebook.md",
    "README.md": "overview.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "first-change.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmark-scripts.md",
}
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)(?=[)#])")
NAMED = re.compile(r"\[`?[\w/]+\.md`?\](?=\(([^)#:\s]+))")  # links whose text is the name of their page
LANGUAGES = {".py": "python", ".yml": "yaml", ".sh": "bash", ".sbatch": "bash"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Set the navigation: the groups of docs/README.md."""
    groups: dict[str, list[dict[str, str]]] = {}
    for line in (ROOT / "docs" / "README.md").read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"\| ([^|\[]+) \| \|", line):
            pages = groups.setdefault(_capitalised(heading[1]), [])
        elif link := re.match(r"\| \[(.*?)\]\((.*?)\)", line):
            pages.append({_capitalised(link[1]): site_uri(posixpath.normpath(f"docs/{link[2]}"))})
    config.nav = [{"Home": [{"Front page": "index.md"}, {"Overview": "overview.md"}, {"All pages": "contents.md"}]}]
    config.nav += [{title: pages} for title, pages in groups.items()]
    config.nav[-1]["Internals"] += [{"How to contribute": "first-change.md"}, {"Security": "security.md"}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/ and the linked source files."""
    markdown = {f"docs/{file.src_uri}": file for file in files.documentation_pages()}
    linked = {path for source in {*PAGES, *markdown} for path in linked_files(source)}
    files.remove(markdown["docs/README.md"])
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, content=page_text(path)))
    for path in sorted(linked):
        uri = site_uri(path)
        if uri not in files.src_uris:
            files.append(File.generated(config, uri, content=source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to files of the repository by links to pages of the site, and the names of pages by titles."""
    uri = page.file.src_uri
    source = next((path for path, staged in PAGES.items() if staged == uri), f"docs/{uri}")
    if uri.startswith("source/"):
        return markdown

    def replace(link: re.Match[str]) -> str:
        path = _repository_path(source, link[1])
        return posixpath.relpath(site_uri(path), posixpath.dirname(uri)) if (ROOT / path).is_file() else link[0]

    def title(link: re.Match[str]) -> str:
        heading = re.search(r"^# (.*)", page_text(_repository_path(source, link[1])), re.MULTILINE)
        return f"[{heading[1]}]" if heading else link[0]

    return LINK.sub(replace, NAMED.sub(title, markdown))


def site_uri(path: str) -> str:
    """Return the source URI of the page or file of the site that shows a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/") and not path.endswith((".py", ".txt", ".json")):
        return path.removeprefix("docs/")
    return f"source/{path}.md"


def linked_files(path: str) -> set[str]:
    """Return the files of the repository to which a Markdown page links."""
    targets = {_repository_path(path, link) for link in LINK.findall(page_text(path))}
    return {target for target in targets if (ROOT / target).is_file()}


def page_text(path: str) -> str:
    """Return a file as Markdown; a notebook as its cells."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if not path.endswith(".ipynb"):
        return text
    cells = (("".join(cell["source"]), cell["cell_type"] == "code") for cell in json.loads(text)["cells"])
    return "\n\n".join(f"```python\n{source}\n```" if is_code else source for source, is_code in cells)


def source_page(path: str) -> str:
    """Return a page that shows a text file. Search skips it."""
    text = (ROOT / path).read_text(encoding="utf-8")
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n``````{language}\n{text}\n``````\n"


def _repository_path(page: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _capitalised(title: str) -> str:
    return title[0].upper() + title[1:]
