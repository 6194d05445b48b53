"""HTML of all reports: the template, sections, tables, figures, numbers and dates."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from reporting.charts import colour_of_run
from reporting.run_reader import Run

FOLDER = Path(__file__).parent


class Html(str):
    """Text that is HTML already; any other text is escaped."""

    __slots__ = ()


@dataclass(frozen=True)
class Section:
    """A section of a page; `name` is the anchor and, capitalised, the link in the head of the page."""

    name: str
    title: str
    body: str


def to_html(text: str) -> Html:
    """Escape text that is not HTML already."""
    return text if isinstance(text, Html) else Html(escape(text))


def element(tag: str, content: str, css: str = "", **attributes: str) -> Html:
    """Return an element with escaped attributes; content that is not HTML is escaped."""
    given = ({"class": css} if css else {}) | attributes
    start = " ".join([tag, *(f'{name}="{escape(value)}"' for name, value in given.items())])
    return Html(f"<{start}>{to_html(content)}</{tag}>")


def fill_template(title: str, sections: Iterable[Section], now: float) -> str:
    """Return a page with a title and sections; sections without content are skipped."""
    shown = [section for section in sections if section.body]
    links = (element("a", part.name.capitalize(), href=f"#{part.name}") for part in shown)
    bodies = (f'<section id="{part.name}">\n<h2>{escape(part.title)}</h2>\n{part.body}\n</section>' for part in shown)
    written = element("p", f"Written {date(now)} by report.py.", "quiet")
    texts = {
        "title": escape(title),
        "links": "".join(links),
        "body": "\n".join([element("h1", title), *bodies, written]),
        "style": (FOLDER / "page.css").read_text(encoding="utf-8"),
        "script": (FOLDER / "page.js").read_text(encoding="utf-8"),
    }
    template = (FOLDER / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\$(title|links|body|style|script)\b", lambda place: texts[place[1]], template)


def table(rows: Sequence[Sequence[str]], css: str = "") -> Html:
    """Return a table whose first row is the head; a row of one cell is the heading of the rows below."""
    head, *body = rows
    lines = [_row(head, "th"), *(_row(row, "td") if len(row) > 1 else _group(row[0], len(head)) for row in body)]
    start = f'<table class="{css}">' if css else "<table>"
    return Html(f'<div class="card wide">{start}\n' + "\n".join(lines) + "\n</table></div>")


def _row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(element(tag, cell) for cell in cells)}</tr>"


def _group(title: str, columns: int) -> str:
    return f'<tr class="group"><th colspan="{columns}">{to_html(title)}</th></tr>'


def figure(uri: str, caption: str, alt: str, **data: str) -> Html:
    """Return an image, given as a data URI, with its caption and alternative text, and attributes for the script."""
    image = f'<img src="{uri}" alt="{escape(alt)}">'
    return element("figure", Html(f"{image}<figcaption>{escape(caption)}</figcaption>"), **data)


def run_label(runs: Sequence[Run], i: int) -> Html:
    """Return the name of the i-th run, after a dot in the colour of its curves if there are several runs."""
    dot = element("span", "", "dot", style=f"background: {colour_of_run(i, len(runs))}") if len(runs) > 1 else ""
    return Html(dot + escape(runs[i].name))


def number(value: float, digits: int = 4) -> str:
    """Return a number with some significant digits; "?" if it is not finite."""
    return f"{value:.{digits}g}" if math.isfinite(value) else "?"


def date(timestamp: float) -> str:
    """Return a time in seconds since 1970 as a date in UTC; "?" if it is not finite or out of range."""
    try:
        return f"{datetime.fromtimestamp(timestamp, UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):
        return "?"
