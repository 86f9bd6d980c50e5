"""Tokenize and Detokenize: inverses of each other, within limits."""

from __future__ import annotations

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from support.fakes import BOS
from support.harness import Server, failure

TEXTS = ["", "plain", "日本語 😀👩‍🔬 e\u0301", "\0\x7f\n\t", " leading and trailing "]


@pytest.mark.parametrize("text", TEXTS)
async def test_detokenize_inverts_tokenize(loaded: Server, text: str) -> None:
    answer = await loaded.stub.Tokenize(pb.TokenizeRequest(content=text))
    assert list(answer.token_ids) == [*text.encode()]
    request = pb.DetokenizeRequest(token_ids=answer.token_ids)
    assert (await loaded.stub.Detokenize(request)).content == text


async def test_special_tokens_are_those_of_a_prompt(loaded: Server) -> None:
    request = pb.TokenizeRequest(content="x", add_special_tokens=True)
    ids = (await loaded.stub.Tokenize(request)).token_ids
    assert list(ids) == [BOS, ord("x")]
    assert (await loaded.complete("x", num_predict=1))[-1].prompt_eval_count == len(ids)


async def test_invalid_bytes_are_replaced(loaded: Server) -> None:
    request = pb.DetokenizeRequest(token_ids=[0x61, 0xFF, 0x62])
    assert (await loaded.stub.Detokenize(request)).content == "a\ufffdb"


async def test_an_answer_holds_a_million_tokens_at_most(loaded: Server) -> None:
    request = pb.TokenizeRequest(content="é" * 500_000)
    assert len((await loaded.stub.Tokenize(request)).token_ids) == 1_000_000
    problem = await failure(loaded.stub.Tokenize(pb.TokenizeRequest(content="x" * 1_000_001)))
    assert problem.reason == "INVALID_FIELD"
    assert set(problem.violations) == {"content"}
    assert "1000001" in problem.message


async def test_text_beyond_four_mebibytes_is_refused(loaded: Server) -> None:
    most = 4 * 2**20 - 1024
    request = pb.DetokenizeRequest(token_ids=[0x61] * most)
    assert len((await loaded.stub.Detokenize(request)).content) == most
    more = pb.DetokenizeRequest(token_ids=[0x61] * (most + 1))
    problem = await failure(loaded.stub.Detokenize(more))
    assert set(problem.violations) == {"token_ids"}


async def test_both_need_a_model(server: Server) -> None:
    for call in (
        server.stub.Tokenize(pb.TokenizeRequest(content="x")),
        server.stub.Detokenize(pb.DetokenizeRequest(token_ids=[1])),
    ):
        assert (await failure(call)).reason == "MODEL_NOT_LOADED"
