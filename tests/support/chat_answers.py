"""Answers of a server's Chat, with their parts joined."""

from __future__ import annotations

from typing import Any

from mlxrunner.v1 import runner_pb2 as pb
from support.harness import Server

HELLO = pb.ChatMessage(role=pb.ROLE_USER, content="Which way?")


class Answered:
    """The parts of an answer, joined."""

    def __init__(self, messages: list[pb.ChatResponse]) -> None:
        self.content = "".join(message.content for message in messages)
        self.reasoning = "".join(message.reasoning for message in messages)
        self.ids = [id_ for message in messages for id_ in message.token_ids]
        self.last = messages[-1]
        assert self.last.done

    @property
    def parts(self) -> tuple[object, ...]:
        """All that must not depend on the batch."""
        return self.content, self.reasoning, self.ids, self.last.reasoning_eval_count


async def answer(server: Server, bias: dict[int, float] | None = None, **fields: Any) -> Answered:
    """Return an answer; fields of the completion options go into the options."""
    names = pb.CompletionOptions.DESCRIPTOR.fields_by_name
    options = {name: fields.pop(name) for name in list(fields) if name in names}
    options.setdefault("num_predict", 60)
    request = pb.ChatRequest(
        messages=[HELLO], options=pb.CompletionOptions(logit_bias=bias or {}, **options), **fields
    )
    return Answered([message async for message in server.stub.Chat(request)])
