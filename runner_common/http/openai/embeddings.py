"""``POST /v1/embeddings``."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.http.fields import Fields, kind_of
from runner_common.http.openai.models import named
from runner_common.http.openai.options import read_ids
from runner_common.http.openai.unsupported import check_unsupported
from runner_common.serving.interceptor import UnreadableRequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runner_common.http.body import JsonObject
    from runner_common.http.exchange import Exchange
    from runner_common.http.host import Host

MAX_INPUTS = 2048
"""Most texts of a request, as in OpenAI's interface."""

_PER_CALL = 64
"""Most texts of a call to the host. Vectors of up to 16,384 numbers then fit into gRPC's default
limit of 4 MiB."""


@dataclass(frozen=True, slots=True)
class EmbeddingOrder:
    """A request for vectors, translated.

    Attributes:
        request: The request without texts.
        inputs: The texts.
        is_base64: Whether vectors are sent as base64 rather than as numbers.
        dimensions: Numbers in a vector that the caller expects; None for any.
    """

    request: pb.EmbedRequest
    inputs: list[pb.EmbedInput]
    is_base64: bool
    dimensions: int | None

    def parts(self) -> Iterator[pb.EmbedRequest]:
        """Yield requests with the next texts each."""
        for start in range(0, len(self.inputs), _PER_CALL):
            part = pb.EmbedRequest()
            part.CopyFrom(self.request)
            part.inputs.extend(self.inputs[start : start + _PER_CALL])
            yield part


def read_embedding(body: JsonObject) -> EmbeddingOrder:
    """Translate a request.

    Raises:
        UnreadableRequestError: A field is missing, invalid or not supported.
    """
    fields = Fields(body)
    request = pb.EmbedRequest(
        model=fields.text("model") or "",
        priority=fields.integer("priority") or 0,
        request_id=fields.text("request_id") or "",
        literal=fields.boolean("literal") or False,
    )
    inputs = _inputs(fields)
    format_ = fields.choice("encoding_format", ("float", "base64"))
    dimensions = fields.integer("dimensions", 1)
    check_unsupported(fields)
    fields.finish()
    return EmbeddingOrder(request, inputs, format_ == "base64", dimensions)


def _inputs(fields: Fields) -> list[pb.EmbedInput]:
    value = fields.take("input")
    match value:
        case str():
            return [pb.EmbedInput(text=value)]
        case [int(), *_]:
            return [_ids(fields, "input", value)]
        case [str() | list(), *_] if len(value) > MAX_INPUTS:
            fields.refuse("input", f"{len(value)} texts; at most {MAX_INPUTS}")
            return []
        case [str() | list(), *_]:
            return [_input(fields, f"input[{i}]", each) for i, each in enumerate(value)]
    text = "required: a text, a list of texts, a list of token ids, or a list of such lists"
    fields.refuse("input", f"{text}, not {kind_of(value)} of others" if value else text)
    return []


def _input(fields: Fields, name: str, value: object) -> pb.EmbedInput:
    if isinstance(value, str):
        return pb.EmbedInput(text=value)
    if isinstance(value, list):
        return _ids(fields, name, value)
    fields.refuse(name, f"a text or a list of token ids is required, not {kind_of(value)}")
    return pb.EmbedInput()


def _ids(fields: Fields, name: str, values: list[object]) -> pb.EmbedInput:
    return pb.EmbedInput(token_ids=pb.TokenIds(ids=read_ids(fields, name, values)))


async def embed(host: Host, exchange: Exchange, body: JsonObject) -> None:
    """Return the vectors of texts."""
    order = read_embedding(body)
    model = await named(host, exchange, order.request.model)
    found: list[dict[str, Any]] = []
    tokens = 0
    for part in order.parts():
        answer = await host.embed(part, exchange.call)
        tokens += answer.prompt_eval_count
        for vector in answer.embeddings:
            _check_dimensions(order.dimensions, len(vector.values))
            found.append(
                {
                    "object": "embedding",
                    "index": len(found),
                    "embedding": _values(vector, is_base64=order.is_base64),
                }
            )
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    await exchange.send_json({"object": "list", "data": found, "model": model, "usage": usage})


def _check_dimensions(wanted: int | None, count: int) -> None:
    if wanted not in (None, count):
        text = f"{wanted}: vectors of this model have {count} numbers and are not shortened"
        raise UnreadableRequestError([("dimensions", text)])


def _values(vector: pb.Embedding, *, is_base64: bool) -> str | list[float]:
    if not is_base64:
        return list(vector.values)
    packed = struct.pack(f"<{len(vector.values)}f", *vector.values)
    return base64.b64encode(packed).decode()
