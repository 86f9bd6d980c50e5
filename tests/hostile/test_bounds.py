"""Requests as large as a message may be are refused at little cost."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from support.call_outcomes import TOO_LARGE, Caller
from support.fakes import VOCAB_SIZE, ByteCodec, FakeBackend
from support.harness import Server, StartServer, failure
from support.hostile_requests import METHODS, encode_field

MOST_IDS = 4 * 2**20
WITHOUT_TEXT = VOCAB_SIZE - 1


async def test_too_many_biases_are_refused_by_their_count(loaded: Server) -> None:
    problem = await failure(loaded.start(logit_bias=dict.fromkeys(range(100_000), 1e9)))
    assert problem.violations == {"options.logit_bias": "100000 entries; at most 1024"}


async def test_too_many_stop_strings_are_refused_by_their_count(loaded: Server) -> None:
    problem = await failure(loaded.start(stop=[""] * 100_000))
    assert problem.violations == {"options.stop": "100000; at most 64"}


async def test_too_many_stop_tokens_are_refused_by_their_count(loaded: Server) -> None:
    problem = await failure(loaded.start(stop_token_ids=[-1] * 100_000))
    assert problem.violations == {"options.stop_token_ids": "100000; at most 1024"}


async def test_too_many_ids_to_detokenize_are_refused(loaded: Server) -> None:
    """Limit the number of ids: their text may be empty and sets no bound."""
    ids = [WITHOUT_TEXT] * MOST_IDS
    request = pb.DetokenizeRequest(token_ids=ids)
    assert not (await loaded.stub.Detokenize(request)).content
    request.token_ids.append(-1)
    problem = await failure(loaded.stub.Detokenize(request))
    assert set(problem.violations) == {"token_ids"}
    assert str(MOST_IDS + 1) in problem.message
    assert str(MOST_IDS) in problem.message


async def test_grpc_refuses_a_message_over_the_limit(loaded: Server) -> None:
    """Expect the one error without details: the server never sees the message."""
    caller = Caller(loaded.channel)
    most = 64 * 2**20
    assert await caller.send(("Tokenize", b"\x0a" + b"x" * most)) == TOO_LARGE
    filler = encode_field(9999, 2, b"x" * (most - 9))
    assert len(filler) <= most
    # The server sees this one.
    assert await caller.send(("Tokenize", filler)) == "INVALID_FIELD"


@pytest.mark.parametrize("name", [method.name for method in METHODS])
async def test_bytes_that_are_not_a_message_are_refused(loaded: Server, name: str) -> None:
    caller = Caller(loaded.channel)
    assert await caller.send((name, b"\xff\xff")) == "INVALID_FIELD"


async def test_an_unknown_rpc_is_unimplemented(loaded: Server) -> None:
    """Expect the code alone, as the error is gRPC's own."""
    call: Any = loaded.channel.unary_unary("/mlxrunner.v1.RunnerService/Forget")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


class CountingCodec(ByteCodec):
    """Codec with a lower bound of tokens beyond any limit; counts the texts tokenized."""

    def __init__(self) -> None:
        self.split = 0

    def encode(self, text: str, *, as_prompt: bool, literal: bool = False) -> list[int]:
        """See ``Codec.encode``."""
        self.split += 1
        return super().encode(text, as_prompt=as_prompt, literal=literal)

    def fewest_tokens(self, text: str, enough: int, *, literal: bool = False) -> int:  # noqa: ARG002 - as a text
        """See ``Codec.fewest_tokens``."""
        assert enough < len(text)
        return enough + 1


async def test_a_text_that_must_be_too_long_is_not_tokenized(start_server: StartServer) -> None:
    codec = CountingCodec()
    server = await start_server(FakeBackend(codec=codec))
    await server.load()
    text = "x" * (3 * 2**20)
    problem = await failure(server.start(text))
    assert problem.reason == "PROMPT_TOO_LONG"
    assert int(problem.metadata["promptTokens"]) > int(problem.metadata["contextLength"])
    problem = await failure(server.stub.Tokenize(pb.TokenizeRequest(content=text)))
    assert set(problem.violations) == {"content"}
    assert codec.split == 0
    assert await server.text("short", num_predict=3)
    assert codec.split == 1
