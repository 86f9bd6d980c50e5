"""A part of ``make models``: one type of each kind, against mlx_lm's own generation."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend import MlxBackend
from runner_server.mlx_backend.planning import working_memory
from tools.memory.catalog import CONFIGS, LEFT_OUT
from tools.models.__main__ import QUICK
from tools.models.check import Checker, Verdict
from tools.models.table import document, table

ALONE = {"gemma2", "llama4"}


@pytest.fixture(scope="module")
def checker(backend: MlxBackend) -> Checker:
    return Checker(backend, quick=True)


@pytest.mark.parametrize("model_type", QUICK)
def test_one_type_of_each_kind_is_right(checker: Checker, model_type: str) -> None:
    verdict = checker.check(model_type)
    assert (verdict.alone, verdict.prefix) == ("yes", "yes")
    assert verdict.batch == ("alone" if model_type in ALONE else "yes")
    assert bool(verdict.notes) == (model_type in ALONE)


def test_a_wrong_type_is_told(checker: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "runner_server.mlx_backend.loading.loader.try_together", lambda *_args: None
    )
    monkeypatch.delitem(working_memory._KNOWN_ALONE, "afm7")
    verdict = checker.check("afm7")
    assert not verdict.is_right
    assert "log probabilities differ" in verdict.batch


def test_every_type_has_a_line(tmp_path: Path) -> None:
    page = tmp_path / "models.md"
    page.write_text("Types\n<!-- `make models` writes what follows. -->\nold\n")
    verdicts = [Verdict(name, alone="yes", batch="yes") for name in CONFIGS]
    document(page, verdicts)
    text = page.read_text()
    assert "old" not in text
    assert table(verdicts) in text
    assert all(f"| {name} | " in text for name in (*CONFIGS, *LEFT_OUT))
