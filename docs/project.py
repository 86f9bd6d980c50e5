"""Facts of the project that the site shows, from pyproject.toml alone."""

from __future__ import annotations

import html
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


@dataclass(frozen=True)
class Project:
    """The project.

    Attributes:
        name: Name of the package.
        version: Version of the package.
        copyright: Holders and license, as the foot of each page has them.
        repository: Address of the repository; empty if pyproject.toml has none.
    """

    name: str
    version: str
    copyright: str
    repository: str

    @classmethod
    def read(cls, path: Path = PYPROJECT) -> Project:
        """Read a pyproject.toml."""
        facts: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        holders = ", ".join(author["name"] for author in facts["authors"])
        return cls(
            name=facts["name"],
            version=facts["version"],
            copyright=f"{holders}; {facts['license']}",
            repository=facts.get("urls", {}).get("Repository", ""),
        )

    def theme_options(self) -> dict[str, Any]:
        """Return the options of the theme: a link to the repository at the foot of each page."""
        if not self.repository:
            return {}
        link = {
            "name": "Repository",
            "url": self.repository,
            "html": html.escape(self.repository.removeprefix("https://")),
            "class": "",
        }
        return {"footer_icons": [link]}
