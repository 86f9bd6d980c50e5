"""Masks computed one after another, and in parallel after a while."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.engine.backend import LoadedModel
from runner_server.engine.types import Constraint
from runner_server.mlx_backend.constraints.matcher import RowMatcher
from runner_server.mlx_backend.sampling import masks as module
from runner_server.mlx_backend.sampling.masks import TokenMasks

CONSTRAINTS = (
    Constraint("regex", ("[a-c]+",)),
    Constraint("choice", ("yes", "no")),
    Constraint("json_object"),
)


def matcher(model: LoadedModel, constraint: Constraint) -> RowMatcher:
    return cast("RowMatcher", model.grammars.compile(constraint).result(timeout=60).start())


@pytest.mark.parametrize("count", [0, 1, 2])
def test_every_row_has_its_own_mask_whoever_computes_it(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Threads compute the masks after the first ``count`` ones."""
    size = tiny.info.vocab_size
    matchers = [matcher(tiny, each) for each in CONSTRAINTS]
    alone = [TokenMasks([each], size).compute()[0] for each in matchers]
    ticks = itertools.chain([0.0] * (count + 1), itertools.repeat(math.inf))
    clock: Any = SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr(module, "time", clock)
    together = TokenMasks(matchers, size).compute()
    assert together == alone
    assert len(set(together)) == len(together)
