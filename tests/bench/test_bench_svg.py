"""Plots are SVG with colors that follow the reader's scheme, the same bytes each time."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="no matplotlib (the bench group)")

from bench import svg


def _plot(path: Path) -> str:
    from matplotlib import pyplot as plt

    svg.use()
    figure, pane = plt.subplots(figsize=(svg.WIDTH_INCHES, 2))
    pane.plot([1, 2, 3], label="ours")
    pane.set(title="a title", xlabel="streams")
    pane.grid()
    svg.save(figure, path)
    plt.close(figure)
    return path.read_text(encoding="utf-8")


def test_colors_of_text_background_and_grid_follow_the_scheme(tmp_path: Path) -> None:
    style, _, drawing = _plot(tmp_path / "plot.svg").partition("</style>")
    assert "prefers-color-scheme: dark" in style
    for variable, color in (("ink", svg.INK), ("paper", svg.PAPER), ("grid", svg.GRID)):
        assert f"var(--{variable})" in drawing
        assert color not in drawing


def test_words_are_text(tmp_path: Path) -> None:
    assert ">a title</text>" in _plot(tmp_path / "plot.svg")


def test_the_same_data_makes_the_same_bytes(tmp_path: Path) -> None:
    assert _plot(tmp_path / "first.svg") == _plot(tmp_path / "second.svg")
