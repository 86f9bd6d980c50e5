"""Constraints of completions, from the message to the stream, with a real model."""

from __future__ import annotations

import asyncio
import gc
import json
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.mlx_backend import MlxBackend
from runner_server.mlx_backend.constraints.matcher import GrammarMatcher
from support.harness import Server, eventually, failure, joined, running, tokens
from support.sweeps import sampled

DEMO = Path(__file__).parents[2] / "runner_server/demo/model"
SCHEMA = {
    "type": "object",
    "properties": {"word": {"type": "string", "maxLength": 8}, "count": {"enum": [1, 2, 3]}},
    "required": ["word", "count"],
    "additionalProperties": False,
}
RECORD = pb.Constraint(json_schema=json.dumps(SCHEMA))
KINDS = [
    RECORD,
    pb.Constraint(json_object=pb.JsonObject()),
    pb.Constraint(regex="[a-z]{3,9}( [a-z]{3,9}){2}"),
    pb.Constraint(lark='start: /[0-9]{1,4}/ "+" /[0-9]{1,4}/'),
    pb.Constraint(choice=pb.Choice(texts=["left", "right"])),
]
Build = Callable[..., Path]


@pytest.fixture
async def real(socket_dir: Path) -> AsyncIterator[Server]:
    """A server with the demo model, which is left without rows and matchers."""
    if not (DEMO / "model.safetensors").is_file():
        pytest.skip("the demo model is not in this checkout")
    backend: Any = MlxBackend()
    async with running(socket_dir, backend) as (app, channel, ready):
        server = Server(app, backend, channel, ready)
        await server.load(str(DEMO), parallel=4)
        yield server
        await eventually(lambda: not server.view.requests)
        await eventually(lambda: matcher_count() == 0)


def matcher_count() -> int:
    return sum(isinstance(each, GrammarMatcher) for each in gc.get_objects())


def last(messages: list[pb.CompletionResponse]) -> pb.CompletionResponse:
    assert messages[-1].done
    return messages[-1]


@pytest.mark.parametrize("constraint", KINDS, ids=lambda each: str(each.WhichOneof("kind")))
async def test_streams_together_give_the_text_of_one_alone(
    real: Server, constraint: pb.Constraint
) -> None:
    options: dict[str, Any] = {"seed": 4, "num_predict": 60, "prompt": "x = "}
    alone = await real.complete(constraint=constraint, **options)
    others = [real.start("def main", num_predict=60, seed=n, constraint=KINDS[n]) for n in range(4)]
    beside = await asyncio.gather(*(real.complete(constraint=constraint, **options) for _ in "ab"))
    for call in others:
        call.cancel()
    for messages in beside:
        assert joined(messages) == joined(alone)
        assert tokens(messages) == tokens(alone)
        assert last(messages).constraint_satisfied == last(alone).constraint_satisfied
    if last(alone).done_reason == pb.DONE_REASON_STOP:
        assert last(alone).constraint_satisfied


async def test_a_finished_text_is_satisfied_and_a_cut_one_is_not(real: Server) -> None:
    whole = await real.complete(constraint=RECORD, seed=1)
    assert (last(whole).done_reason, last(whole).constraint_satisfied) == (
        pb.DONE_REASON_STOP,
        True,
    )
    assert set(json.loads(joined(whole))) == {"word", "count"}
    for length in (1, 3, last(whole).eval_count - 2):
        cut = last(await real.complete(constraint=RECORD, seed=1, num_predict=length))
        assert (cut.done_reason, cut.HasField("constraint_satisfied")) == (
            pb.DONE_REASON_LENGTH,
            True,
        )
        assert not cut.constraint_satisfied
    # Without its end token, the text is complete too.
    most = last(whole).eval_count - 1
    complete = last(await real.complete(constraint=RECORD, seed=1, num_predict=most))
    assert (complete.done_reason, complete.constraint_satisfied) == (pb.DONE_REASON_LENGTH, True)


async def test_a_stop_string_cuts_the_text(real: Server) -> None:
    cut = await real.complete(constraint=RECORD, seed=1, stop=["count"])
    assert (last(cut).stop_match, last(cut).constraint_satisfied) == ("count", False)
    assert joined(cut).startswith("{")
    words = pb.Constraint(regex="[a-z]{3}( [a-z]{3})*")
    text = await real.complete(constraint=words, seed=1, stop=[" "], num_predict=50)
    assert (last(text).stop_match, last(text).constraint_satisfied) == (" ", True)
    assert len(joined(text)) == 3


async def test_log_probabilities_belong_to_the_text(real: Server) -> None:
    messages = await real.complete(constraint=RECORD, seed=1, logprobs=3)
    entries = [entry for message in messages for entry in message.logprobs]
    assert "".join(entry.text for entry in entries) == joined(messages)
    assert [entry.token_id for entry in entries] == tokens(messages)


async def test_a_constraint_without_a_text_fails_in_the_stream(real: Server) -> None:
    stuck = pb.Constraint(lark=r'start: "ab" x' + "\n" + r"x: /[^\s\S]/")
    neighbour = asyncio.create_task(real.complete(constraint=RECORD, seed=1))
    problem = await failure(real.start(constraint=stuck, num_predict=50))
    assert (problem.code, problem.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert "no token can continue the text" in problem.violations["constraint"]
    assert last(await neighbour).constraint_satisfied
    assert not (await real.status()).last_error


@pytest.mark.parametrize("count", sampled([100, 1000], [100]))
async def test_cancelled_streams_leave_nothing(real: Server, count: int) -> None:
    """The fixture checks for remains."""
    draw = random.Random(count)  # noqa: S311 - reproducible

    async def cancelled(number: int) -> None:
        call = real.start("x", constraint=KINDS[number % 5], num_predict=200, seed=number)
        for _ in range(draw.randrange(4)):
            if await call.read() == grpc.aio.EOF:
                return
        call.cancel()

    for first in range(0, count, 10):
        await asyncio.gather(*(cancelled(number) for number in range(first, first + 10)))


async def test_an_unload_and_a_replaced_model_end_constrained_streams(
    real: Server, model_dir: Build
) -> None:
    for _ in range(2):
        endless = pb.Constraint(regex="[a-z ]{2000,}")
        # A text that hardly repeats itself, because drafts could end it before the load begins.
        call = real.start(constraint=endless, num_predict=1900, temperature=2, top_k=0)
        await anext(aiter(call))
        await real.load(str(model_dir()))
        assert (await failure(call)).reason == "SHUTTING_DOWN"
        assert last(await real.complete(constraint=KINDS[4])).constraint_satisfied
    assert list((await real.status()).model.capabilities.constraint_kinds) == [1, 2, 3, 4, 5]
