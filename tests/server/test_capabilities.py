"""``Model.capabilities``: each limit is accepted, and one more is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.api.convert import model_message
from support.fakes import VOCAB_SIZE, model_info
from support.harness import Server, failure


async def capabilities(server: Server) -> pb.Capabilities:
    return (await server.status()).model.capabilities


async def test_a_load_and_a_status_tell_the_same(server: Server) -> None:
    response = await server.load()
    assert response.model.capabilities == await capabilities(server)


async def test_every_field_is_set(loaded: Server) -> None:
    told = await capabilities(loaded)
    assert len(told.ListFields()) == len(pb.Capabilities.DESCRIPTOR.fields)
    assert told.rank_count == 1


@pytest.mark.parametrize(("parallel", "batched"), [(1, False), (2, True)])
async def test_batching_depends_on_the_slots(server: Server, parallel: int, batched: bool) -> None:
    await server.load(parallel=parallel)
    assert (await capabilities(server)).batched == batched


@pytest.mark.parametrize("size", [0, 100])
async def test_reuse_depends_on_the_size_of_the_prefix_cache(server: Server, size: int) -> None:
    await server.load(prefix_cache_bytes=size)
    assert (await capabilities(server)).prefix_cache == bool(size)


async def test_the_longest_sequence_is_the_context_in_force(server: Server) -> None:
    await server.load(context_length=64)
    longest = (await capabilities(server)).max_context_length
    assert longest == 64
    # The fake's tokenizer puts one token before the text.
    fits = await server.complete("x" * (longest - 2), num_predict=10)
    assert fits[-1].eval_count == 1
    assert (await failure(server.start("x" * (longest - 1)))).reason == "PROMPT_TOO_LONG"


async def test_log_probabilities_are_accepted_up_to_the_limit(loaded: Server) -> None:
    most = (await capabilities(loaded)).max_logprobs
    await loaded.complete(logprobs=most, num_predict=1)
    assert set((await failure(loaded.start(logprobs=most + 1))).violations) == {"logprobs"}


async def test_ids_for_log_probabilities_are_accepted_up_to_the_limit(loaded: Server) -> None:
    most = (await capabilities(loaded)).max_logprob_token_id_count
    await loaded.complete(logprob_token_ids=[1] * most, num_predict=1)
    problem = await failure(loaded.start(logprob_token_ids=[1] * (most + 1)))
    assert set(problem.violations) == {"logprob_token_ids"}


async def test_stop_strings_are_accepted_up_to_the_limit(loaded: Server) -> None:
    most = (await capabilities(loaded)).max_stop_count
    await loaded.complete(stop=["\0"] * most, num_predict=1)
    problem = await failure(loaded.start(stop=["\0"] * (most + 1)))
    assert set(problem.violations) == {"options.stop"}


async def test_stop_tokens_are_accepted_up_to_the_limit(loaded: Server) -> None:
    most = (await capabilities(loaded)).max_stop_token_id_count
    await loaded.complete(stop_token_ids=[300] * most, num_predict=1)
    problem = await failure(loaded.start(stop_token_ids=[300] * (most + 1)))
    assert set(problem.violations) == {"options.stop_token_ids"}


async def test_logit_biases_are_accepted_up_to_the_limit(server: Server) -> None:
    await server.load()
    most = (await capabilities(server)).max_logit_bias_count
    assert most > VOCAB_SIZE, "more ids than the fake has, so the count alone is tested"
    problem = await failure(server.start(logit_bias=dict.fromkeys(range(most + 1), 0.0)))
    assert problem.violations["options.logit_bias"].endswith(f"at most {most}")


def test_a_small_vocabulary_limits_the_log_probabilities() -> None:
    info = replace(model_info(), vocab_size=5)
    assert model_message(info).capabilities.max_logprobs == 5


def test_ranks_are_counted() -> None:
    assert model_message(model_info(), 3).capabilities.rank_count == 3
