"""Requests and results of embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxrunner.v1 import runner_pb2 as pb
from runner_client.checks import check_flag, check_ids, check_integer, check_text
from runner_client.errors import NotSupportedError
from runner_client.rpc.messages.requests import named, sendable
from runner_client.types import Embedding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runner_client.errors import ModelUnsupportedError


def embed_request(
    inputs: Sequence[str | Sequence[int]],
    *,
    literal: bool = False,
    request_id: str = "",
    priority: int = 0,
    model: str | None = None,
) -> pb.EmbedRequest:
    """Build the request to embed texts or token ids, with the errors of ``completion_request``."""
    if isinstance(inputs, str):
        # A string is a sequence too: each of its characters would count as a text.
        raise TypeError(f"inputs is a sequence of texts: write [{inputs!r}]")
    for index, each in enumerate(inputs):
        if not isinstance(each, str):
            check_ids(f"inputs[{index}]", each, "text (str) or a sequence of token ids")
    check_flag("literal", literal)
    check_text("request_id", request_id)
    check_integer("priority", priority)
    with sendable():
        return pb.EmbedRequest(
            inputs=map(_input, inputs),
            literal=literal,
            request_id=request_id,
            priority=priority,
            model=named(model),
        )


def _input(given: str | Sequence[int]) -> pb.EmbedInput:
    if isinstance(given, str):
        return pb.EmbedInput(text=given)
    return pb.EmbedInput(token_ids=pb.TokenIds(ids=given))


def embeddings(message: pb.EmbedResponse) -> list[Embedding]:
    """Convert the response of an embedding."""
    return [Embedding(tuple(each.values), each.token_count) for each in message.embeddings]


def not_supported(error: ModelUnsupportedError) -> NotSupportedError:
    """Return the error of a model that does not embed, for one of the runner."""
    return NotSupportedError(
        str(error), reason=error.reason, code=error.code, metadata=error.metadata
    )
