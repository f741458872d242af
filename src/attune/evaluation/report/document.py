"""A small document, written once and rendered twice: Markdown for the repository, HTML for the browser.

The text of a block is never trusted: prompts and names come from data sets and configuration files, and both
formats can carry links, scripts and broken tables. The renderers escape it, so whoever builds a block must not.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote


@dataclass(frozen=True)
class Heading:
    """A section title."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain text; `quiet` for notes that accompany something else."""

    text: str
    quiet: bool = False


@dataclass(frozen=True)
class Items:
    """A list of (lead, text)."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Cell:
    """A table cell; tone is "good", "bad" or ""."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """Rows as long as the header; the first column is text, all others are numbers unless `prose`."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell | str, ...], ...]
    prose: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure: its path as seen from the report, and its PNG bytes for the self-contained page."""

    title: str
    path: str
    png: bytes


DocumentBlock = Heading | Paragraph | Items | Table | Picture


# C0 and C1 controls, and the bidirectional overrides that make text read differently from what it is
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]+")


def one_line(text: str) -> str:
    """Text on one line, without control characters, encodable as UTF-8."""
    text = text.encode("utf-8", "replace").decode()
    return " ".join(_INVISIBLE.sub(" ", text).split())


def escape_markdown(text: str) -> str:
    """Makes untrusted text show as itself, in one line, anywhere in Markdown, also in a table cell.

    CommonMark lets any ASCII punctuation be escaped by a backslash; HTML goes by entities. Escaping `@`, the
    colon of `http://` and the dot of `www.` stops the bare links of GitHub's dialect.
    """
    text = re.sub(r"([\\`*_\[\]|~$#@]|:(?=\S))", r"\\\1", one_line(text))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"(?i)\b(www)\.", r"\1\\.", text)
    # only at the start of a line do these open a list, a rule or a heading: -0.1 stays as it is
    text = re.sub(r"^([-+=])(?=\s|$|\1)", r"\\\1", text)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)


def escape_html(text: str) -> str:
    """Makes untrusted text show as itself, in one line, in HTML text and quoted attributes."""
    return html.escape(one_line(text), quote=True)


def _cell(cell: Cell | str) -> Cell:
    return cell if isinstance(cell, Cell) else Cell(cell)


def render_markdown(title: str, blocks: Sequence[DocumentBlock]) -> str:
    """The document as GitHub Markdown; pictures are links to their files."""
    parts = [f"# {escape_markdown(title)}", *(_markdown(block) for block in blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown(block: DocumentBlock) -> str:
    match block:
        case Heading(text):
            return f"## {escape_markdown(text)}"
        case Paragraph(text, quiet):
            return ("> " if quiet else "") + escape_markdown(text)
        case Items(items):
            return "\n".join(f"- **{escape_markdown(lead)}**: {escape_markdown(text)}" for lead, text in items)
        case Table(header, rows, prose):
            rule = ["---", *(["---" if prose else "---:"] * (len(header) - 1))]
            lines = [[escape_markdown(_cell(cell).text) for cell in row] for row in (header, *rows)]
            return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))
        case Picture(title, path, _):
            return f"![{escape_markdown(title)}]({quote(path)})"


def render_html(title: str, blocks: Sequence[DocumentBlock]) -> str:
    """The document as one self-contained page: no script, no network, figures embedded."""
    body = "\n".join(_html(block) for block in blocks)
    return _PAGE.format(title=escape_html(title), style=_STYLE, body=body)


def _html(block: DocumentBlock) -> str:
    match block:
        case Heading(text):
            return f"<h2>{escape_html(text)}</h2>"
        case Paragraph(text, quiet):
            return f"<p{_class('quiet' if quiet else '')}>{escape_html(text)}</p>"
        case Items(items):
            rows = (f"<li><b>{escape_html(lead)}</b>: {escape_html(text)}</li>" for lead, text in items)
            return f"<ul>{''.join(rows)}</ul>"
        case Table(header, rows, prose):
            head = "".join(f'<th scope="col">{escape_html(name)}</th>' for name in header)
            lines = "\n".join(_html_row(row) for row in rows)
            table = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody>"
            return f'<div class="wide"><table{_class("prose" if prose else "")}>{table}</table></div>'
        case Picture(title, _, png):
            data = base64.b64encode(png).decode()
            alt = escape_html(title)
            image = f'<img alt="{alt}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{alt}</figcaption></figure>"


def _html_row(row: Sequence[Cell | str]) -> str:
    first, *rest = (_cell(cell) for cell in row)
    cells = (f"<td{_class(cell.tone)}>{escape_html(cell.text)}</td>" for cell in rest)
    return f'<tr><th scope="row">{escape_html(first.text)}</th>{"".join(cells)}</tr>'


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { --ink: #1d2330; --soft: #667085; --line: #e4e7ec; --paper: #fff; --good: #0f7a4d; --bad: #b42318; }
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e8ee; --soft: #98a2b3; --line: #333a48; --paper: #14181f; --good: #57c596; --bad: #f97066;
  }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 1.5rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; }
p, ul { max-width: 46rem; }
li { margin: .4rem 0; }
.quiet { color: var(--soft); font-size: .82rem; margin: .4rem 0 1rem; max-width: none; }
.quiet, figcaption { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .9rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 600; }
.prose td, .prose th { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.good { color: var(--good); }
.bad { color: var(--bad); }
figure { margin: 1.5rem 0 2.25rem; }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .4rem; }
"""
