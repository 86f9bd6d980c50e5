"""Loads across ranks: models without a split, failures of one rank, cancelled loads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.engine.types import LoadSpec
from runner_server.errors import ModelUnsupported
from support.rank_processes import DEMO, THREE_HEADS, Ranks, failure_of, problem_of, ranks
from support.server_child import DEADLINE_SECONDS, Child

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
pytestmark = pytest.mark.mlx

Build = Callable[..., Path]


def load_failure(first: Child, model: Path, **fields: Any) -> tuple[str, str]:
    """Return the reason and message of a failing load."""
    request = pb.LoadRequest(model=str(model), **fields)
    return problem_of(failure_of(partial(first.stub.Load, request, timeout=DEADLINE_SECONDS)))


def can_generate(first: Child) -> bool:
    """Return whether the ranks load a model and generate together."""
    first.load(DEMO)
    return [message.eval_count for message in first.complete(5)][-1] == 5


def test_ranks_keep_working_after_failed_loads(
    two: Ranks, model_dir: Build, tmp_path: Path
) -> None:
    first = two.first
    reason, text = load_failure(first, model_dir("mamba"))
    assert reason == "MODEL_UNSUPPORTED"
    assert "serve it without --distributed" in text
    reason, text = load_failure(first, model_dir("llama", **THREE_HEADS))
    assert reason == "MODEL_UNSUPPORTED"
    assert "'llama' cannot be split among 2 ranks: its num_key_value_heads is 3" in text
    assert load_failure(first, tmp_path / "nothing")[0] == "MODEL_NOT_FOUND"
    assert load_failure(first, DEMO, memory_limit_bytes=2**20)[0] == "INSUFFICIENT_MEMORY"
    assert first.status().state == pb.STATE_IDLE
    assert can_generate(first)


def _is_reading(status: pb.StatusResponse) -> bool:
    """Return whether a load is past its beginning; the previous model has a progress, too."""
    return status.state == pb.STATE_LOADING and status.progress > 3


def test_ranks_keep_working_after_a_cancelled_load(two: Ranks, deep: Path) -> None:
    first = two.first
    request = pb.LoadRequest(model=str(deep))
    call = first.stub.Load.future(request, timeout=DEADLINE_SECONDS)
    first.wait_for(lambda: _is_reading(first.status()))
    call.cancel()
    first.wait_for(lambda: first.status().state == pb.STATE_IDLE)
    assert can_generate(first)
    first.stub.Unload(pb.UnloadRequest(), timeout=DEADLINE_SECONDS)
    assert first.status().state == pb.STATE_IDLE
    assert can_generate(first)


def test_a_load_error_of_one_rank_names_the_rank(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    with ranks(tmp_path, 2, follower_args=["--model-root", str(theirs)]) as started:
        reason, text = load_failure(started.first, DEMO)
        assert reason == "MODEL_NOT_FOUND"
        assert text.startswith("rank 1 on ")
        assert started.first.status().state == pb.STATE_IDLE
        here = shutil.copytree(DEMO, theirs / "model")
        started.first.load(here)
        assert started.first.status().state == pb.STATE_ACTIVE


def shard(size: int, *, by_layers: bool) -> Any:
    """Return a rank's part; no other rank is contacted."""
    from runner_server.mlx_backend.sharding import Shard

    group: Any = SimpleNamespace(rank=0, size=size, all=None)
    partners: Any = SimpleNamespace()
    return Shard(group, partners, by_layers=by_layers)


def test_a_model_without_layers_to_split_is_refused() -> None:
    model: Any = SimpleNamespace(shard=None, model=SimpleNamespace())
    with pytest.raises(ModelUnsupported, match=r"'x'.*among 2.*leave out --pipeline"):
        shard(2, by_layers=True).split(model, {"model_type": "x"}, LoadSpec("x"))


def test_fewer_layers_than_ranks_are_refused() -> None:
    def pipeline(_group: object) -> None:
        raise ValueError("split [1, 1, 0] must be positive and sum to 2 layers")

    model: Any = SimpleNamespace(model=SimpleNamespace(pipeline=pipeline))
    with pytest.raises(ModelUnsupported, match="must be positive"):
        shard(3, by_layers=False).split(model, {"model_type": "x"}, LoadSpec("x"))


def test_layers_with_unlike_caches_are_not_split() -> None:
    from runner_server.mlx_backend.upstream.names import RotatingKVCache

    cache = RotatingKVCache(max_size=8)
    model: Any = SimpleNamespace(
        model=SimpleNamespace(pipeline=lambda _group: None), make_cache=lambda: [cache]
    )
    with pytest.raises(ModelUnsupported, match="RotatingKVCache"):
        shard(2, by_layers=False).split(model, {"model_type": "x"}, LoadSpec("x"))
