"""``Embed`` over the wire, on a fake model: a vector is the count and the sum of the tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.contract import MAX_EMBED_INPUTS
from runner_server.engine.work import DecodeItem, EmbedItem
from support.fakes import BOS, DEADLINE_SECONDS, EOS, PREFILL_CHUNK, VOCAB_SIZE
from support.harness import Server, StartServer, eventually, failure


def inputs(texts: Sequence[str | Sequence[int]]) -> list[pb.EmbedInput]:
    return [
        pb.EmbedInput(text=text)
        if isinstance(text, str)
        else pb.EmbedInput(token_ids=pb.TokenIds(ids=text))
        for text in texts
    ]


def start(server: Server, *texts: str | Sequence[int], **fields: Any) -> Any:
    request = pb.EmbedRequest(inputs=inputs(texts), **fields)
    return server.stub.Embed(request, timeout=DEADLINE_SECONDS)


def ids_of(text: str) -> list[int]:
    return [BOS, *text.encode(), EOS]


def vector_of(ids: Sequence[int]) -> list[float]:
    return [len(ids), sum(ids)]


# -- answers ---------------------------------------------------------------------


async def test_each_text_has_its_vector_in_the_order_of_the_request(loaded: Server) -> None:
    texts = ["a", "a much longer text", "bb", "日本", "z" * 50]
    answer = await start(loaded, *texts)
    assert [list(each.values) for each in answer.embeddings] == [
        vector_of(ids_of(text)) for text in texts
    ]
    assert [each.token_count for each in answer.embeddings] == [*map(len, map(ids_of, texts))]
    assert answer.prompt_eval_count == sum(each.token_count for each in answer.embeddings)


async def test_token_ids_are_used_as_they_are(loaded: Server) -> None:
    answer = await start(loaded, [5], [1, 2, 3], "x")
    assert [list(each.values) for each in answer.embeddings] == [
        [1, 5],
        [3, 6],
        vector_of(ids_of("x")),
    ]


async def test_many_texts_of_many_requests_get_their_own_vectors(loaded: Server) -> None:
    calls = [[f"{call}-{text}" * (1 + text % 7) for text in range(40)] for call in range(12)]
    answers = await asyncio.gather(*(start(loaded, *texts) for texts in calls))
    for texts, answer in zip(calls, answers, strict=True):
        assert [list(each.values) for each in answer.embeddings] == [
            vector_of(ids_of(text)) for text in texts
        ]
    await eventually(lambda: not loaded.backend.executors[-1].texts)
    assert not loaded.view.requests


async def test_the_model_says_how_it_embeds(loaded: Server) -> None:
    told = (await loaded.status()).model.capabilities
    assert (told.embedding_dimension, told.max_embed_count) == (2, MAX_EMBED_INPUTS)
    assert told.max_embed_tokens == told.max_context_length
    assert told.completion


# -- beside completions ----------------------------------------------------------


async def test_texts_and_steps_alternate(loaded: Server) -> None:
    """Run a completion, and check that no more chunks than a slice fit between two of its steps."""
    executor = loaded.backend.executors[-1]
    items: list[object] = []
    run = executor.run

    def note(item: Any) -> Any:
        items.append(item)
        return run(item)

    executor.run = note  # type: ignore[method-assign]
    loaded.backend.step_gate.shut()
    completion = loaded.start("hello", num_predict=4000)
    call = asyncio.ensure_future(start(loaded, *["x" * 200] * 20))
    await eventually(lambda: loaded.view.request_count == 2)
    loaded.backend.step_gate.open()
    answer = await call
    completion.cancel()
    assert len(answer.embeddings) == 20
    first = next(i for i, item in enumerate(items) if isinstance(item, EmbedItem))
    last = max(i for i, item in enumerate(items) if isinstance(item, EmbedItem))
    between = items[first : last + 1]
    longest = run_length = 0
    for item in between:
        run_length = 0 if isinstance(item, DecodeItem) else run_length + 1
        longest = max(longest, run_length)
    assert len(between) > 20 * 200 // PREFILL_CHUNK
    assert longest <= 4
    assert any(isinstance(item, DecodeItem) for item in between)


async def test_embedding_needs_no_slot_of_a_completion(server: Server) -> None:
    await server.load(parallel=1)
    running, waiting = server.start("running"), server.start("waiting")
    await running.read()
    await eventually(lambda: len(server.view.waiting) == 1)
    answer = await start(server, "text")
    assert list(answer.embeddings[0].values) == vector_of(ids_of("text"))
    assert len(server.view.waiting) == 1
    running.cancel()
    waiting.cancel()


async def test_requests_wait_while_memory_is_short(server: Server) -> None:
    server.backend.kv_budget_bytes = 100 * 100
    await server.load(parallel=4, context_length=100)
    server.backend.step_gate.shut()
    first = asyncio.ensure_future(start(server, "x" * 58))
    await server.thread(server.backend.step_gate.wait_arrival)
    second = asyncio.ensure_future(start(server, "x" * 58))
    await eventually(lambda: server.view.request_count == 2)
    assert len(server.view.embedding) == 1
    assert (await server.status()).queued_count == 1
    server.backend.step_gate.open()
    await asyncio.gather(first, second)


# -- refusals --------------------------------------------------------------------


async def test_invalid_fields_are_named(loaded: Server) -> None:
    request = pb.EmbedRequest(
        inputs=[pb.EmbedInput(), *inputs(["", []])], priority=101, request_id="x" * 129
    )
    problem = await failure(loaded.stub.Embed(request))
    assert problem.reason == "INVALID_FIELD"
    assert set(problem.violations) <= {
        *("inputs[0]", "inputs[1].text", "inputs[2].token_ids", "priority", "request_id")
    }
    assert "inputs[0]" in problem.violations


@pytest.mark.parametrize("count", [0, MAX_EMBED_INPUTS + 1])
async def test_the_number_of_texts_is_limited(loaded: Server, count: int) -> None:
    problem = await failure(start(loaded, *["x"] * count))
    assert set(problem.violations) == {"inputs"}
    assert f"1 to {MAX_EMBED_INPUTS}" in problem.message


async def test_a_token_outside_the_vocabulary_is_named(loaded: Server) -> None:
    problem = await failure(start(loaded, "x", [1, VOCAB_SIZE]))
    assert set(problem.violations) == {"inputs[1].token_ids.ids[1]"}


async def test_only_texts_can_be_literal(loaded: Server) -> None:
    assert (await start(loaded, "x", literal=True)).embeddings
    problem = await failure(start(loaded, "x", [1], literal=True))
    assert set(problem.violations) == {"literal"}


@pytest.mark.parametrize("length", [14, 15])
async def test_nothing_is_cut(server: Server, length: int) -> None:
    await server.load(context_length=16)
    call = start(server, "ok", "x" * length)
    if length + 2 <= 16:
        assert (await call).embeddings[1].token_count == 16
        return
    problem = await failure(call)
    assert problem.reason == "PROMPT_TOO_LONG"
    assert problem.metadata == {"promptTokens": "17", "contextLength": "16"}
    assert "inputs[1]" in problem.message


async def test_a_model_that_does_not_embed_says_why(start_server: StartServer) -> None:
    server = await start_server()
    server.backend.embeds = False
    await server.load()
    problem = await failure(start(server, "x"))
    assert (problem.code, problem.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "MODEL_UNSUPPORTED",
    )
    assert "does not embed" in problem.message
    told = (await server.status()).model.capabilities
    assert (told.embedding_dimension, told.max_embed_count, told.max_embed_tokens) == (0, 0, 0)


async def test_a_model_that_only_embeds_completes_nothing(server: Server) -> None:
    server.backend.completes = False
    await server.load()
    assert not (await server.status()).model.capabilities.completion
    chat = pb.ChatRequest(messages=[pb.ChatMessage(role=pb.ROLE_USER, content="x")])
    for call in (server.start(), server.stub.Chat(chat)):
        problem = await failure(call)
        assert problem.reason == "MODEL_UNSUPPORTED"
        assert "output layer" in problem.message
    assert (await start(server, "x")).embeddings


async def test_a_text_that_never_fits_the_memory_is_refused(server: Server) -> None:
    server.backend.kv_budget_bytes = 10 * 100
    await server.load()
    problem = await failure(start(server, "x" * 9))
    assert problem.reason == "INSUFFICIENT_MEMORY"
    assert "split the text" in problem.message
    assert (await start(server, "x" * 8)).embeddings


async def test_a_full_queue_refuses(start_server: StartServer) -> None:
    server = await start_server(max_queued=1)
    await server.load(parallel=1)
    server.backend.step_gate.shut()
    calls = [asyncio.ensure_future(start(server, "x")) for _ in range(2)]
    await eventually(lambda: server.view.request_count == 2)
    assert (await failure(start(server, "x"))).reason == "QUEUE_FULL"
    server.backend.step_gate.open()
    await asyncio.gather(*calls)


# -- ends ------------------------------------------------------------------------


async def test_an_abort_ends_the_call_and_frees_its_memory(loaded: Server) -> None:
    loaded.backend.step_gate.shut()
    call = asyncio.ensure_future(start(loaded, "x" * 50, request_id="mine"))
    await loaded.thread(loaded.backend.step_gate.wait_arrival)
    answer = await loaded.stub.Abort(pb.AbortRequest(request_ids=["mine"]))
    assert answer.aborted_count == 1
    assert (await failure(call)).reason == "ABORTED"
    loaded.backend.step_gate.open()
    await eventually(lambda: not loaded.backend.executors[-1].texts)
    assert not loaded.view.embedding


async def test_cancelling_the_call_ends_the_request(loaded: Server) -> None:
    loaded.backend.step_gate.shut()
    call = start(loaded, "x" * 50)
    await loaded.thread(loaded.backend.step_gate.wait_arrival)
    call.cancel()
    await eventually(lambda: loaded.view.command_count > 0)
    loaded.backend.step_gate.open()
    await eventually(lambda: not loaded.backend.executors[-1].texts)
    assert not loaded.view.requests


async def test_a_drain_waits_for_embeddings(loaded: Server) -> None:
    loaded.backend.step_gate.shut()
    call = asyncio.ensure_future(start(loaded, "x"))
    await loaded.thread(loaded.backend.step_gate.wait_arrival)
    drain = asyncio.ensure_future(loaded.stub.Drain(pb.DrainRequest()))
    await eventually(lambda: loaded.app.engine.state().state.value == "draining")
    assert (await failure(start(loaded, "y"))).reason == "SHUTTING_DOWN"
    loaded.backend.step_gate.open()
    assert (await call).embeddings
    assert (await drain).finished_count == 1


async def test_an_unload_ends_the_call(loaded: Server) -> None:
    loaded.backend.step_gate.shut()
    call = asyncio.ensure_future(start(loaded, "x" * 50))
    await loaded.thread(loaded.backend.step_gate.wait_arrival)
    unload = asyncio.ensure_future(loaded.stub.Unload(pb.UnloadRequest()))
    await eventually(lambda: loaded.view.command_count > 0)
    loaded.backend.step_gate.open()
    assert (await failure(call)).reason == "SHUTTING_DOWN"
    await unload


async def test_a_vector_that_is_not_finite_fails_its_request_alone(loaded: Server) -> None:
    loaded.backend.broken_token = 7
    fine, broken = await asyncio.gather(
        start(loaded, [1, 2]), failure(start(loaded, [1], [1, 7], [7, 7]))
    )
    assert list(fine.embeddings[0].values) == [2, 3]
    assert broken.reason == "GENERATION_FAILED"
    assert "not finite" in broken.message
    assert "not finite" in (await loaded.status()).last_error


async def test_failed_steps_with_successful_ones_between_do_not_end_the_process(
    loaded: Server,
) -> None:
    for _ in range(4):
        loaded.backend.failures.append(RuntimeError("broken"))
        assert (await failure(start(loaded, "x"))).reason == "GENERATION_FAILED"
        assert (await start(loaded, "x")).embeddings


async def test_two_failed_steps_in_a_row_end_the_process(loaded: Server) -> None:
    loaded.backend.failures += [RuntimeError("broken"), RuntimeError("broken")]
    for _ in range(2):
        assert (await failure(start(loaded, "x"))).reason == "GENERATION_FAILED"
    await eventually(lambda: loaded.app.engine.state().state.value == "failed")
