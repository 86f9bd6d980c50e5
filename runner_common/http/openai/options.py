"""Options of both `/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.http.fields import INT32, INT64, Fields, kind_of

if TYPE_CHECKING:
    from runner_common.http.body import JsonObject

MAX_CHOICES = 128
"""Most choices of a request, as in OpenAI's interface."""

_SEEDS = 2**64
_MAX_ID_DIGITS = 10
"""More digits than those of any token id, so that all of them are 32-bit numbers."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """Form of the answer to a request.

    Attributes:
        model: Name of the model in the request; empty for the only one.
        is_stream: Whether to stream it.
        includes_usage: Whether the stream ends with the usage.
        choices: Choices of each prompt.
    """

    model: str
    is_stream: bool
    includes_usage: bool
    choices: int


def read_delivery(fields: Fields) -> Delivery:
    """Return how the answer is delivered."""
    is_stream = fields.boolean("stream") or False
    includes_usage = False
    if options := fields.inside("stream_options"):
        if not is_stream:
            fields.refuse("stream_options", "only with stream")
        includes_usage = options.boolean("include_usage") or False
        # Padding against observers of the network, which TLS does not hide lengths from.
        options.take("include_obfuscation")
        if options.boolean("continuous_usage_stats"):
            options.refuse("continuous_usage_stats", "the usage comes at the end only")
        options.end()
    count = fields.integer("n", 1, MAX_CHOICES) or 1
    if fields.has("best_of") and fields.take("best_of") != count:
        fields.refuse("best_of", "only the value of n: choices are not compared")
    return Delivery(fields.text("model") or "", is_stream, includes_usage, count)


def read_options(fields: Fields) -> pb.CompletionOptions:
    """Return the options, with the defaults of OpenAI's interface.

    The server checks the ranges, which `runner.proto` states.
    """
    # OpenAI's defaults, which differ from those of the protocol.
    options = pb.CompletionOptions(
        temperature=1.0, top_p=1.0, top_k=0, repeat_last_n=-1, penalize_output_only=True
    )
    for ours, theirs in _NUMBERS.items():
        if (number := fields.number(theirs)) is not None:
            setattr(options, ours, number)
    for ours, theirs in _INTEGERS.items():
        if (integer := fields.integer(theirs)) is not None:
            setattr(options, ours, integer)
    if (seed := fields.integer("seed", *INT64)) is not None:
        options.seed = seed
    if (limit := _max_tokens(fields)) is not None:
        options.num_predict = limit
    options.stop.extend(_stops(fields))
    options.ignore_eos = fields.boolean("ignore_eos") or False
    options.stop_token_ids.extend(
        read_ids(fields, "stop_token_ids", fields.items("stop_token_ids"))
    )
    _read_bias(fields, options)
    return options


_NUMBERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
"""Fields of the options with the names that OpenAI, or else vLLM, gives them."""

_INTEGERS = {"top_k": "top_k", "min_predict": "min_tokens"}


def _max_tokens(fields: Fields) -> int | None:
    old = fields.integer("max_tokens", 1)
    new = fields.integer("max_completion_tokens", 1)
    if old is not None and new is not None and old != new:
        fields.refuse("max_tokens", "differs from max_completion_tokens, which replaces it")
    return old if new is None else new


def _stops(fields: Fields) -> list[str]:
    value = fields.take("stop")
    if value is None:
        return []
    stops = [value] if isinstance(value, str) else value
    if not (isinstance(stops, list) and all(isinstance(stop, str) for stop in stops)):
        fields.refuse("stop", "a text or a list of texts is required")
        return []
    return stops


def _read_bias(fields: Fields, options: pb.CompletionOptions) -> None:
    for key, value in (fields.mapping("logit_bias") or {}).items():
        name = f"logit_bias[{key[:20]}]"
        token = int(key) if key.isascii() and key.isdecimal() and len(key) < _MAX_ID_DIGITS else -1
        if token < 0:
            fields.refuse(name, "not a token id")
        elif (bias := fields.finite(name, value)) is not None:
            options.logit_bias[token] = bias


def read_ids(fields: Fields, name: str, values: list[object]) -> list[int]:
    """Return token ids; record other values as a problem."""
    low, high = INT32
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            fields.refuse(name, f"a list of token ids is required; it has {kind_of(value)}")
            return []
    return values  # type: ignore[return-value]  # all of them are whole numbers


def read_common(fields: Fields, request: pb.ChatRequest | pb.CompletionRequest) -> None:
    """Read extensions with the names of our own protocol."""
    request.priority = fields.integer("priority") or 0
    request.cache_salt = fields.text("cache_salt") or ""
    request.adapter = fields.text("adapter") or ""
    request.request_id = fields.text("request_id") or ""
    request.literal = fields.boolean("literal") or False


def read_structure(fields: Fields, request: pb.ChatRequest | pb.CompletionRequest) -> None:
    """Read ``response_format`` or vLLM's ``structured_outputs``."""
    has_format = _read_format(fields, request.constraint)
    wanted = fields.inside("structured_outputs")
    if wanted and has_format:
        fields.refuse("structured_outputs", "cannot be combined with response_format")
    elif wanted:
        _read_structured(wanted, request.constraint)
    if not request.constraint.WhichOneof("kind"):
        request.ClearField("constraint")


def _read_format(fields: Fields, constraint: pb.Constraint) -> bool:
    """Read ``response_format``; return whether it constrains the text."""
    found = fields.inside("response_format")
    if found is None:
        return False
    kind = found.choice("type", ("text", "json_object", "json_schema"))
    if not found.has("type"):
        found.refuse("type", "required: text, json_object or json_schema")
    if kind == "json_object":
        constraint.json_object.SetInParent()
    if kind == "json_schema":
        schema = found.inside("json_schema") or Fields(
            {}, found.at("json_schema"), found.violations
        )
        # For OpenAI, true makes the schema binding, which it always is here.
        schema.boolean("strict")
        schema.text("name")
        schema.text("description")
        wanted = schema.mapping("schema")
        if wanted is None:
            found.refuse("json_schema.schema", "required: a JSON schema")
        constraint.json_schema = json_text(wanted or {})
        schema.end()
    found.end()
    return kind in ("json_object", "json_schema")


def _read_structured(fields: Fields, constraint: pb.Constraint) -> None:
    given = [name for name in _STRUCTURES if fields.has(name)]
    if len(given) != 1:
        fields.refuse(
            given[-1] if given else "json", f"one of {', '.join(_STRUCTURES)} is required"
        )
        return
    schema = fields.take("json")
    if isinstance(schema, dict | str):
        constraint.json_schema = schema if isinstance(schema, str) else json_text(schema)
    elif schema is not None:
        fields.refuse("json", "a JSON schema is required, as an object or a text")
    if fields.boolean("json_object"):
        constraint.json_object.SetInParent()
    if (regex := fields.text("regex")) is not None:
        constraint.regex = regex
    if (grammar := fields.text("grammar")) is not None:
        constraint.lark = grammar
    choices = fields.items("choice")
    if not all(isinstance(each, str) for each in choices):
        fields.refuse("choice", "a list of texts is required")
    elif choices:
        constraint.choice.texts.extend(choices)
    fields.end()


_STRUCTURES = ("json", "json_object", "regex", "choice", "grammar")


def json_text(value: JsonObject) -> str:
    """Return the JSON text of an object."""
    return json.dumps(value, ensure_ascii=False)


def seed_of(seed: int, choice: int) -> int:
    """Return the seed of a choice, to get the same text again alone.

    Args:
        seed: The seed of the request: that of the first choice.
        choice: Index of the choice.
    """
    return (seed + choice - INT64[0]) % _SEEDS + INT64[0]
