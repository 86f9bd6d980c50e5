"""Requests to generate text, as messages of ``mlxrunner.v1``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.contract import MAX_LOGPROBS
from runner_common.http.ollama.translation.fields import Fields
from runner_common.http.ollama.translation.keep_alive import read_keep_alive
from runner_common.http.ollama.translation.messages import (
    NO_IMAGES,
    read_format,
    read_message,
    read_tool,
)
from runner_common.http.ollama.translation.options import read_options

if TYPE_CHECKING:
    from runner_common.http.body import JsonObject

_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "max": "high"}
"""Levels of ``think``, and those that templates know."""

_NOT_RAW = ("system", "template", "context")

_UNSUPPORTED = {
    "suffix": "is not supported: no model here inserts text before a suffix",
    "template": "is not supported: the template is the one in the model's files",
    "context": "is not supported: send the conversation to /api/chat",
    "images": NO_IMAGES,
    "shift": "is not supported: a full context ends the text with done_reason length",
    "width": "is not supported: this server generates text",
    "height": "is not supported: this server generates text",
    "steps": "is not supported: this server generates text",
    "_debug_render_only": "is not supported; see RenderChat of mlxrunner.v1",
}


@dataclass(frozen=True, slots=True)
class Call:
    """Common part of requests for a model.

    Attributes:
        model: The model's name as requested.
        keep_alive: Time for which the idle model stays loaded, in seconds; ``inf`` for
            indefinitely, None if the request does not say.
        num_ctx: The context that the request needs, in tokens; None if it does not say.
    """

    model: str
    keep_alive: float | None
    num_ctx: int | None


@dataclass(frozen=True, slots=True)
class Generation(Call):
    """A request to generate text.

    Attributes:
        request: The request for the runner, without its model; None if the model is only to be
            loaded or unloaded.
        is_chat: Whether the answer is a message, and not a text.
        is_stream: Whether the answer is sent in parts.
        think: Whether the model is to reason; None if the request does not say.
        effort: How much, as templates call it; empty if the request does not say.
    """

    request: pb.ChatRequest | pb.CompletionRequest | None
    is_chat: bool
    is_stream: bool
    think: bool | None
    effort: str


def read_model(fields: Fields) -> str:
    """Return the name of the model.

    Raises:
        UnreadableRequestError: There is none.
    """
    name = fields.text("model")
    if not name:
        fields.refuse("model", "is required")
    return name


def read_chat(body: JsonObject) -> Generation:
    """Read a request of ``/api/chat``.

    Raises:
        UnreadableRequestError: A field is of the wrong type, or cannot be honoured.
    """
    fields = Fields(body)
    messages = [read_message(each) for each in fields.inners("messages")]
    request = pb.ChatRequest(messages=messages)
    request.tools.extend(read_tool(each) for each in fields.inners("tools"))
    return _generation(fields, request, is_chat=True, is_empty=not messages)


def read_generate(body: JsonObject) -> Generation:
    """Read a request of ``/api/generate``.

    Raises:
        UnreadableRequestError: A field is of the wrong type, or cannot be honoured.
    """
    fields = Fields(body)
    prompt, system = fields.text("prompt") or "", fields.text("system") or ""
    request: pb.ChatRequest | pb.CompletionRequest
    if fields.flag("raw"):
        fields.refuse_set(_NOT_RAW, "is not possible with raw")
        request = pb.CompletionRequest(prompt=prompt)
    else:
        request = pb.ChatRequest()
        if system:
            request.messages.add(role=pb.ROLE_SYSTEM, content=system)
        request.messages.add(role=pb.ROLE_USER, content=prompt)
    return _generation(fields, request, is_chat=False, is_empty=not prompt)


def _generation(
    fields: Fields,
    request: pb.ChatRequest | pb.CompletionRequest,
    *,
    is_chat: bool,
    is_empty: bool,
) -> Generation:
    model, keep_alive = read_model(fields), read_keep_alive(fields)
    is_stream = fields.flag("stream") is not False
    options, num_ctx = read_options(fields.inner("options"))
    request.options.CopyFrom(options)
    if constraint := read_format(fields):
        request.constraint.CopyFrom(constraint)
    think, effort = _read_think(fields, is_raw=isinstance(request, pb.CompletionRequest))
    _read_logprobs(fields, request)
    # Prompts are never cut: one that is too long is refused, whatever this says.
    fields.flag("truncate")
    for name, problem in _UNSUPPORTED.items():
        fields.refuse_set((name,), problem)
    fields.finish()
    return Generation(
        model,
        keep_alive,
        num_ctx,
        request=None if is_empty else request,
        is_chat=is_chat,
        is_stream=is_stream,
        think=think,
        effort=effort,
    )


def _read_think(fields: Fields, *, is_raw: bool) -> tuple[bool | None, str]:
    value = fields.value("think")
    if value is None:
        return None, ""
    effort = _EFFORTS.get(value) if isinstance(value, str) else ""
    if effort is None or not isinstance(value, bool | str):
        fields.refuse("think", f"must be true, false, or one of {', '.join(_EFFORTS)}")
    if is_raw and value:
        fields.refuse("think", "is not possible with raw")
    return bool(value), effort


def _read_logprobs(fields: Fields, request: pb.ChatRequest | pb.CompletionRequest) -> None:
    count = fields.whole("top_logprobs") or 0
    if not 0 <= count <= MAX_LOGPROBS:
        fields.refuse("top_logprobs", f"is {count}; must be 0 to {MAX_LOGPROBS}")
    if fields.flag("logprobs"):
        request.logprobs = count
