"""SVG plots that follow the reader's color scheme and stay legible on a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WIDTH_INCHES = 5.2
"""Width of a plot: with text of 11 points, a phone of 400 pixels shows it at three quarters."""

INK, PAPER, GRID = "#1f2328", "#fefefe", "#d0d7de"
"""Colors of text and axes, background, and grid; replaced by the variables of the style."""

_VARIABLES = {INK: "var(--ink)", PAPER: "var(--paper)", GRID: "var(--grid)"}
_STYLE = f"""\
<style>
  svg {{ --ink: {INK}; --paper: {PAPER}; --grid: {GRID} }}
  @media (prefers-color-scheme: dark) {{
    svg {{ --ink: #e6edf3; --paper: #161b22; --grid: #3d444d }}
  }}
</style>
"""
_SETTINGS = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": PAPER,
    "axes.labelcolor": INK,
    "axes.titlesize": "medium",
    "figure.facecolor": PAPER,
    "font.size": 11,
    "grid.color": GRID,
    "legend.fontsize": "small",
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "plot",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def use() -> None:
    """Set matplotlib up for plots that ``save`` writes."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update(_SETTINGS)


def save(figure: Any, path: Path) -> None:
    """Write a figure, the same bytes for the same data.

    Args:
        figure: A figure of matplotlib, drawn after ``use``.
        path: The file to write, ending in ``.svg``.
    """
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    text = path.read_text(encoding="utf-8")
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    head, mark, drawing = text.partition("<defs>")
    lines = (line.rstrip() for line in f"{head}{_STYLE}{mark}{drawing}".splitlines())
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
