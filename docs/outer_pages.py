"""Pages of the site that show files outside of docs/, and links to them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
ROOT = HERE.parent

_OUTER = re.compile(r"^% is (\S+)\n")
"""First line of a page that shows another file."""

_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#]+)")
_OTHER_PAGES = {
    "proto/mlxrunner/v1/runner.proto": "protocol.md",
    "proto/mlxrunner/v1/pool.proto": "protocol.md",
    "examples": "languages.md",
}


def replace(_app: Sphinx, page: str, source: list[str]) -> None:
    """Replace the line that names another file with its text, and adjust all links.

    Args:
        page: Name of the page.
        source: List with the text of the page, which is modified in place.
    """
    text, folder = source[0], (HERE / page).parent
    outer = _OUTER.match(text)
    if outer:
        file = HERE / outer[1]
        text, folder = file.read_text() + text[outer.end() :], file.parent
    here = (HERE / page).parent
    source[0] = _LINK.sub(lambda link: _target(folder, link[1], here), text)


def _target(folder: Path, link: str, here: Path) -> str:
    """Return the link of a file in ``folder``, relative to ``here``."""
    path = os.path.relpath(folder / link, ROOT)
    return os.path.relpath(HERE / _pages().get(path, os.path.relpath(folder / link, HERE)), here)


def _pages() -> dict[str, str]:
    """Return the page that shows each file, by the file's path."""
    outer = {
        os.path.relpath(HERE / found[1], ROOT): page.name
        for page in HERE.glob("*.md")
        if (found := _OUTER.match(page.read_text()))
    }
    return outer | _OTHER_PAGES
