"""The site takes its repository link and its copyright from pyproject.toml."""

from __future__ import annotations

from pathlib import Path

from project import PYPROJECT, Project

FACTS = """
[project]
name = "a-name"
version = "1.2.3"
license = "MIT"
authors = [{ name = "A" }, { name = "B" }]
"""


def _project(folder: Path, more: str = "") -> Project:
    path = folder / "pyproject.toml"
    path.write_text(FACTS + more)
    return Project.read(path)


def test_the_copyright_names_authors_and_license(tmp_path: Path) -> None:
    assert _project(tmp_path).copyright == "A, B; MIT"


def test_without_an_address_the_site_has_no_link(tmp_path: Path) -> None:
    assert _project(tmp_path).theme_options() == {}


def test_the_address_of_the_repository_is_at_the_foot(tmp_path: Path) -> None:
    urls = '[project.urls]\nRepository = "https://example.com/x"\n'
    (link,) = _project(tmp_path, urls).theme_options()["footer_icons"]
    assert (link["url"], link["html"]) == ("https://example.com/x", "example.com/x")


def test_the_projects_own_file_has_what_the_site_shows() -> None:
    assert Project.read(PYPROJECT).name == "mlx-grpc-runner"
