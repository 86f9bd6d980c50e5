"""The property of ``test_every_field`` with MLX: fewer requests, real arithmetic."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from hostile.conftest import CONTEXT_LENGTH, NEIGHBOUR
from mlxrunner.v1 import runner_pb2 as pb
from support.call_outcomes import Caller
from support.harness import Server, eventually, running
from support.hostile_requests import Call, calls

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend import MlxBackend

pytestmark = [
    pytest.mark.mlx,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore:Generating overly large repr"),
]

VOCAB_SIZE = 512
LIFECYCLE = {"Load", "Unload", "Drain"}


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(batch=st.lists(calls(lambda name: name not in LIFECYCLE), min_size=2, max_size=8))
async def test_any_request_is_answered_from_the_error_table_beside_a_neighbour(
    real: Server, alone: str, batch: list[Call]
) -> None:
    caller = Caller(real.channel)
    text, *_ = await asyncio.gather(
        real.text("def main", **NEIGHBOUR), *(caller.send(call) for call in batch)
    )
    for ending in caller.endings:
        event(ending)
    assert text == alone
    status = await real.status()
    assert (status.state, status.last_error) == (pb.STATE_ACTIVE, "")
    await eventually(lambda: not real.view.requests)


@pytest.fixture
async def small(model_dir: Callable[..., Path], socket_dir: Path) -> AsyncIterator[Server]:
    """A server with a model whose whole vocabulary fits ``logit_bias``."""
    backend: Any = MlxBackend()
    async with running(socket_dir, backend) as (app, channel, ready):
        server = Server(app, backend, channel, ready)
        info = await server.load(str(model_dir()), context_length=CONTEXT_LENGTH)
        assert info.model.vocab_size == VOCAB_SIZE
        yield server


@pytest.mark.asyncio(loop_scope="function")
@pytest.mark.parametrize("value", [-100.0, 100.0, -0.0, 1.4e-45])
async def test_equal_biases_for_all_tokens_change_nothing(small: Server, value: float) -> None:
    """Compare equal biases for all tokens with none, and a different one for one token."""
    options: dict[str, Any] = {"temperature": 0.0, "num_predict": 12}
    whole = dict.fromkeys(range(VOCAB_SIZE), value)
    plain = await small.text("def", **options)
    assert await small.text("def", logit_bias=whole, **options) == plain
    if value < 0:
        options["temperature"] = 1.0
        last = (await small.complete("def", logit_bias=whole | {65: 100.0}, **options))[-1]
        assert last.eval_count == 12
