"""A small document as Markdown: for the repository, and for cards of models.

The text of a block is never trusted: prompts and names come from data sets and configuration files, and Markdown can
carry links, HTML and broken tables. The renderer escapes it, so whoever builds a block must not.
"""

from __future__ import annotations

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
class Table:
    """Rows as long as the header; the first column is text, all others are numbers unless `prose`."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    prose: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure: its path as seen from the document."""

    title: str
    path: str


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
            lines = [[escape_markdown(cell) for cell in row] for row in (header, *rows)]
            return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))
        case Picture(title, path):
            return f"![{escape_markdown(title)}]({quote(path)})"
