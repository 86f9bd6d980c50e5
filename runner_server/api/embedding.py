"""``Embed``: validation of the texts, their tokens, and the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.contract import MAX_PRIORITY
from runner_server.api.convert import duration, max_embed_count
from runner_server.api.generation import check_vocabulary
from runner_server.api.prompts import Prompt, too_many
from runner_server.api.validation import check_request_id
from runner_server.api.violations import ViolationCollector
from runner_server.engine.backend import ModelHandle
from runner_server.engine.embedding.request import EmbeddingRequest
from runner_server.engine.embedding.types import EmbedSpec, Vectors
from runner_server.engine.engine import Engine
from runner_server.engine.types import ModelInfo
from runner_server.errors import ModelUnsupported, TextTooLong
from runner_server.telemetry.call_record import current_call

if TYPE_CHECKING:
    from runner_common.serving.statuses import CallContext


async def embed_spec(request: pb.EmbedRequest, model: ModelHandle) -> EmbedSpec:
    """Validate a request, and tokenize the texts in a worker thread.

    Raises:
        ModelUnsupported: The model does not embed.
        InvalidField: A field is missing or out of range, or a text has no tokens, or a token
            outside the model's vocabulary.
        TextTooLong: A text is longer than the model embeds.
    """
    info = model.info
    if info.embedding.problem:
        raise ModelUnsupported(
            f"this model does not embed texts: {info.embedding.problem}", model=info.path
        )
    texts = _texts(request, info)
    ids = [await _token_ids(index, text, model) for index, text in enumerate(texts)]
    return EmbedSpec(tuple(ids), request.request_id, request.priority)


def _texts(request: pb.EmbedRequest, info: ModelInfo) -> list[Prompt]:
    """Check the fields of a request, and return the texts."""
    check = ViolationCollector()
    count, most = len(request.inputs), max_embed_count(info)
    check.require("inputs", 1 <= count <= most, f"{count} texts; 1 to {most}; split the request")
    check_request_id(check, request.request_id)
    check.number("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY)
    texts = [
        _text(check, f"inputs[{index}]", given, is_literal=request.literal)
        for index, given in enumerate(request.inputs[:most])
    ]
    check.finish()
    return texts


def _text(
    check: ViolationCollector, field: str, given: pb.EmbedInput, *, is_literal: bool
) -> Prompt:
    match given.WhichOneof("input"):
        case "text":
            check.require(f"{field}.text", bool(given.text), "the text is empty")
            return Prompt(f"{field}.text", given.text, is_literal)
        case "token_ids":
            ids = given.token_ids.ids
            check.require(f"{field}.token_ids", bool(ids), "the text is empty")
            check.require("literal", not is_literal, "only texts can be literal")
            return Prompt(f"{field}.token_ids.ids", ids)
        case _:
            check.require(field, ok=False, text="required: text or token_ids")
            return Prompt(field, "")


async def _token_ids(index: int, text: Prompt, model: ModelHandle) -> tuple[int, ...]:
    """Return the tokens of a text, with the special ones around a text."""
    most, codec = model.info.embedding.max_tokens, model.codec
    ids: Sequence[int]
    if isinstance(text.content, str):
        if fewest := await too_many(text.content, most, codec, literal=text.literal):
            raise _too_long(index, fewest, model, is_least=True)
        ids = await asyncio.to_thread(codec.encode_whole, text.content, literal=text.literal)
    else:
        ids = text.content
    if len(ids) > most:
        raise _too_long(index, len(ids), model)
    check_vocabulary(text, ids, model.info.vocab_size)
    return tuple(ids)


def _too_long(index: int, count: int, model: ModelHandle, *, is_least: bool = False) -> TextTooLong:
    embedding = model.info.embedding
    return TextTooLong(
        index,
        count,
        embedding.max_tokens,
        is_file_limit=embedding.is_file_limit,
        is_least=is_least,
    )


@asynccontextmanager
async def embedding(
    engine: Engine,
    model: ModelHandle,
    spec: EmbedSpec,
    context: CallContext,
) -> AsyncIterator[EmbeddingRequest]:
    """Submit a request for the duration of a context; cancel an unfinished one at exit.

    Args:
        engine: The engine with the model.
        model: The model that the request was validated for.
        spec: The validated request.
        context: The call; its initial metadata is sent as soon as the request is queued.

    Raises:
        RunnerFault: See :meth:`Engine.submit`.
    """
    request = engine.embed(model, spec)
    current_call().stats = request.stats
    try:
        await context.send_initial_metadata(())
        yield request
    finally:
        engine.cancel(request)


def embed_message(spec: EmbedSpec, found: Vectors) -> pb.EmbedResponse:
    """Return the answer with a vector for each text."""
    return pb.EmbedResponse(
        embeddings=[
            pb.Embedding(values=vector, token_count=len(text))
            for text, vector in zip(spec.texts, found.vectors, strict=True)
        ],
        prompt_eval_count=sum(map(len, spec.texts)),
        prompt_eval_duration=duration(found.seconds),
        queue_duration=duration(found.queue_seconds),
    )
