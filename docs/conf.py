"""The settings of Sphinx: one site of the guides, the protocol and the Python library."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import outer_pages  # noqa: E402 - found through the path above
import protocol_pages  # noqa: E402 - the same

project = "mlx-grpc-runner"
release = metadata.version(project)
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
exclude_patterns = ["_build"]

# Links within a page, as GitHub makes them.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
napoleon_use_ivar = True


def setup(app: Sphinx) -> None:
    """Add the pages of files outside of docs/, and the page generated from the protocol."""
    protocol_pages.write(HERE / "protocol.md")
    app.connect("source-read", outer_pages.replace)
