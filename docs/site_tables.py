"""Tables of the site that fit a screen of any width.

On a narrow screen each row becomes a block, whose cells name their columns (``site.css``). Long
names of tests, options and files may break after their punctuation.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from docutils import nodes

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_LONG_WORD = re.compile(r"\S{13}")
_BREAKS = re.compile(r"(?<=[_/.:])(?=\w)")


def fit(_app: Sphinx | None, doctree: nodes.document, _page: str) -> None:
    """Add names of columns and places for line breaks to all tables of a page."""
    for table in doctree.findall(nodes.table):
        for text in list(table.findall(nodes.Text)):
            if _LONG_WORD.search(text):
                text.parent.replace(text, list(_breakable(text)))
        head, body = table.next_node(nodes.thead), table.next_node(nodes.tbody)
        if head is not None and body is not None:
            _name_columns([cell.astext() for cell in head.findall(nodes.entry)], body)


def _breakable(text: str) -> Iterator[nodes.Node]:
    """Yield the parts of a text, with the HTML element for a possible line break between."""
    first, *rest = _BREAKS.split(text)
    yield nodes.Text(first)
    for part in rest:
        yield nodes.raw("", "<wbr>", format="html")
        yield nodes.Text(part)


def _name_columns(names: list[str], body: nodes.tbody) -> None:
    for row in body.findall(nodes.row):
        for name, cell in zip(names, row.findall(nodes.entry), strict=False):
            if not cell.astext().strip():
                cell["classes"].append("empty")
            elif name:
                mark = f'<span class="column" aria-hidden="true">{html.escape(name)}</span>'
                cell.insert(0, nodes.raw("", mark, format="html"))
