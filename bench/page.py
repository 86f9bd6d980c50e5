"""Generated parts of a page that is otherwise written by hand."""

from __future__ import annotations

from pathlib import Path


def replace_part(path: Path, name: str, text: str) -> None:
    """Replace the text between the two markers of a part.

    Args:
        path: The page.
        name: Name of the part, as in its markers.
        text: The new text.

    Raises:
        ValueError: The page does not have the markers.
    """
    begin, end = f"<!-- {name}: generated -->", f"<!-- {name}: end -->"
    page = path.read_text(encoding="utf-8")
    head, first, rest = page.partition(begin)
    _, second, tail = rest.partition(end)
    if not (first and second):
        raise ValueError(f"{path} has no lines {begin!r} and {end!r}")
    path.write_text(f"{head}{begin}\n\n{text.strip()}\n\n{end}{tail}", encoding="utf-8")
