"""The settings of Sphinx: one site of the guides, the protocol and the Python library."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import outer_pages  # noqa: E402 - found through the path above
import protocol_pages  # noqa: E402 - the same
import site_tables  # noqa: E402 - the same
from project import Project  # noqa: E402 - the same

facts = Project.read()
project, release, copyright = facts.name, facts.version, facts.copyright  # noqa: A001 - Sphinx's
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_theme_options = facts.theme_options()
html_title = f"{project} {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
exclude_patterns = ["_build"]

# Links within a page, as GitHub makes them.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
napoleon_use_ivar = True


def setup(app: Sphinx) -> None:
    """Add the pages of files outside of docs/ and the protocol's page; fit tables to the screen."""
    protocol_pages.write(HERE / "protocol.md")
    app.connect("source-read", outer_pages.replace)
    app.connect("doctree-resolved", site_tables.fit)
