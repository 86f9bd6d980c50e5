"""Tables of the site name their columns in every cell, and break long names."""

from __future__ import annotations

import pytest
from docutils import nodes
from docutils.core import publish_doctree

import site_tables

TABLE = """
======  ============================
fault   shown by
======  ============================
first   ``server/test_step.py::test_it``
second
======  ============================
"""


@pytest.fixture
def table() -> nodes.table:
    """Return a table after the change."""
    doctree = publish_doctree(TABLE)
    site_tables.fit(None, doctree, "page")
    found = doctree.next_node(nodes.table)
    assert isinstance(found, nodes.table)
    return found


def test_each_cell_with_text_names_its_column(table: nodes.table) -> None:
    marks = [raw.astext() for raw in table.findall(nodes.raw) if "column" in raw.astext()]
    names = ["fault", "shown by", "fault"]
    assert marks == [f'<span class="column" aria-hidden="true">{name}</span>' for name in names]


def test_a_cell_without_text_is_marked_as_empty(table: nodes.table) -> None:
    empty = [cell for cell in table.findall(nodes.entry) if "empty" in cell["classes"]]
    assert len(empty) == 1


def test_a_long_name_may_break_after_its_punctuation(table: nodes.table) -> None:
    literal = table.next_node(nodes.literal)
    assert literal is not None
    assert literal.astext().replace("<wbr>", "|") == "server/|test_|step.|py::|test_|it"
