"""A tokenizer with more tokens than the model, and a slow tokenizer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from mlxrunner.v1 import runner_pb2 as pb
from support.fakes import DEADLINE_SECONDS, VOCAB_SIZE, ByteCodec, FakeBackend
from support.harness import StartServer, eventually, failure

BUSY_CALLS = 40
"""More calls than asyncio has worker threads by default."""


class WideCodec(ByteCodec):
    """Codec with a token beyond the model's rows, like an added special token."""

    def encode(self, text: str, *, as_prompt: bool, literal: bool = False) -> list[int]:
        """See ``Codec.encode``."""
        ids = super().encode(text.replace("<pad>", ""), as_prompt=as_prompt, literal=literal)
        return [*ids, VOCAB_SIZE] if "<pad>" in text else ids


class BlockedCodec(ByteCodec):
    """Codec blocked until released by the test."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self.release = threading.Event()

    def encode(self, text: str, *, as_prompt: bool, literal: bool = False) -> list[int]:
        """See ``Codec.encode``."""
        self.arrived.release()
        assert self.release.wait(DEADLINE_SECONDS)
        return super().encode(text, as_prompt=as_prompt, literal=literal)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Codec.decode``."""
        return super().decode(ids)


async def test_a_token_outside_the_model_is_refused(start_server: StartServer) -> None:
    server = await start_server(FakeBackend(codec=WideCodec()))
    await server.load()
    problem = await failure(server.start("a <pad> b", repeat_penalty=1.1))
    assert problem.reason == "INVALID_FIELD"
    assert str(VOCAB_SIZE) in problem.message
    assert list(problem.violations) == ["prompt"]
    assert (await server.complete("a b", num_predict=3))[-1].done


async def test_stopping_does_not_wait_for_tokenizing(start_server: StartServer) -> None:
    codec = BlockedCodec()
    server = await start_server(FakeBackend(codec=codec))
    await server.load()
    calls = [server.stub.Tokenize(pb.TokenizeRequest(content="x")) for _ in range(BUSY_CALLS)]
    answers = [asyncio.create_task(failure(call)) for call in calls]
    try:
        await eventually(lambda: codec.arrived.acquire(blocking=False))
        await asyncio.wait_for(server.app.close(), DEADLINE_SECONDS / 2)
    finally:
        codec.release.set()
        for answer in answers:
            answer.cancel()
        await asyncio.gather(*answers, return_exceptions=True)
