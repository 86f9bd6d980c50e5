"""The property of ``test_every_field`` with MLX: fewer requests, real arithmetic."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from hostile.conftest import NEIGHBOUR
from mlxrunner.v1 import runner_pb2 as pb
from support.call_outcomes import Caller
from support.harness import Server, eventually
from support.hostile_requests import Call, calls

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

pytestmark = [
    pytest.mark.mlx,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore:Generating overly large repr"),
]

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
