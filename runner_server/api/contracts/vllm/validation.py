"""Validation of the requests of ``VllmEngine``.

Fields without presence (``top_p``, ``repetition_penalty``, ``n``) have the value 0 if unset.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxrunner.v1 import runner_pb2
from runner_common.contract import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS
from runner_server.api.constraints import parse_constraint
from runner_server.api.contracts.prompts import read_prompt
from runner_server.api.generation import GenerationDraft
from runner_server.api.validation import MAX_INT32, check_request_id, check_stops
from runner_server.api.violations import ViolationCollector
from runner_server.engine.types import CachePolicy, Constraint, ModelInfo, Sampling

# The stubs are untyped, because their package has no py.typed.
Message = Any

MAX_SAMPLES = 64
"""Most answers to one prompt. Each is a request of its own in the queue."""

_TEMPERATURE = 1.0
"""Default temperature, as in vLLM and in OpenAI's API."""

_PARAMS = "sampling_params"

_UNSUPPORTED: Mapping[str, str] = {
    "kv_transfer_params": "this server neither sends nor receives KV caches",
    "kv_transfer_params_json": "this server neither sends nor receives KV caches",
    "mm_inputs": "this server takes texts only",
    "media_refs": "this server takes texts only",
}
"""Fields of a request that are refused if set, and why."""


@dataclass(frozen=True)
class GenerateCall:
    """A validated request.

    Attributes:
        draft: The request for the engine, of the first answer.
        count: Number of answers.
        is_stream: Whether tokens are sent as they come.
    """

    draft: GenerationDraft
    count: int
    is_stream: bool


def generate_call(request: Message, model: ModelInfo) -> GenerateCall:
    """Validate a request, except for the prompt's tokens, and fill in the defaults.

    Raises:
        InvalidField: A field is missing, out of range, or asks for something that this server
            does not do.
    """
    check = ViolationCollector()
    params = request.sampling_params
    prompt = read_prompt(check, request)
    check_request_id(check, request.request_id)
    _refuse_unsupported(check, request)
    _check_numbers(check, params, model)
    _check_lists(check, params, model)
    constraint = _constraint(check, params)
    end_ids = _end_ids(check, params, model)
    check.finish()
    draft = GenerationDraft(
        prompt=prompt,
        max_tokens=params.max_tokens if params.HasField("max_tokens") else model.context_length,
        sampling=_sampling(params, end_ids),
        stop=tuple(params.stop),
        stop_token_ids=frozenset(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        request_id=request.request_id,
        # Log probabilities of a prompt need the logits of every token, which no cache has.
        cache_policy=CachePolicy(reads=not params.HasField("prompt_logprobs")),
        constraint=constraint,
    )
    return GenerateCall(draft, params.n or 1, request.stream)


def embed_request(request: Message) -> runner_pb2.EmbedRequest:
    """Return the same request as a message of the runner's own protocol.

    Raises:
        InvalidField: The text is missing or empty.
    """
    check = ViolationCollector()
    ids = request.tokenized.input_ids
    check.require("tokenized.input_ids", bool(ids), "the text is empty")
    check_request_id(check, request.request_id)
    check.finish()
    text = runner_pb2.EmbedInput(token_ids=runner_pb2.TokenIds(ids=ids))
    return runner_pb2.EmbedRequest(inputs=[text], request_id=request.request_id)


def _refuse_unsupported(check: ViolationCollector, request: Message) -> None:
    for field, why in _UNSUPPORTED.items():
        check.require(field, not request.HasField(field), f"not supported: {why}")
    check.require(
        "extra_mm_inputs",
        not request.extra_mm_inputs,
        f"not supported: {_UNSUPPORTED['mm_inputs']}",
    )
    # A gateway that pins requests to ranks knows one rank of this server, number 0.
    rank = request.data_parallel_rank
    check.require("data_parallel_rank", rank == 0, f"{rank}; this server has rank 0 only")
    check.require(
        f"{_PARAMS}.truncate_prompt_tokens",
        not request.sampling_params.HasField("truncate_prompt_tokens"),
        "not supported: this server never cuts a prompt; shorten it",
    )


def _check_numbers(check: ViolationCollector, params: Message, model: ModelInfo) -> None:
    def number(field: str, low: float, high: float) -> None:
        check.number(f"{_PARAMS}.{field}", getattr(params, field), low, high)

    most_logprobs = min(MAX_LOGPROBS, model.vocab_size)
    number("temperature", 0, 100)
    number("top_p", 0, 1)
    number("min_p", 0, 1)
    number("top_k", 0, model.vocab_size)
    if params.repetition_penalty:
        number("repetition_penalty", 0.01, 100)
    number("frequency_penalty", -100, 100)
    number("presence_penalty", -100, 100)
    if params.HasField("max_tokens"):
        number("max_tokens", 1, MAX_INT32)
    number("min_tokens", 0, MAX_INT32)
    number("logprobs", 0, most_logprobs)
    number("prompt_logprobs", 0, most_logprobs)
    number("n", 0, MAX_SAMPLES)


def _check_lists(check: ViolationCollector, params: Message, model: ModelInfo) -> None:
    check.bias(f"{_PARAMS}.logit_bias", params.logit_bias, model.vocab_size)
    ids = params.stop_token_ids
    check.token_ids(f"{_PARAMS}.stop_token_ids", ids, model.vocab_size, MAX_STOP_TOKEN_IDS)
    check_stops(check, f"{_PARAMS}.stop", params.stop)


def _constraint(check: ViolationCollector, params: Message) -> Constraint | None:
    """Return the constraint; record one that this server does not have as a violation."""
    kind = params.WhichOneof("constraint")
    if kind is None or (kind == "json_object" and not params.json_object):
        return None
    for field in ("ignore_eos", "min_tokens"):
        text = "cannot be combined with a constraint, which says where the text ends"
        check.require(f"{_PARAMS}.{field}", not getattr(params, field), text)
    message = runner_pb2.Constraint()
    match kind:
        case "structural_tag":
            text = "not supported: use json_schema, regex or grammar"
            check.require(f"{_PARAMS}.structural_tag", ok=False, text=text)
            return None
        case "json_object":
            message.json_object.SetInParent()
        case "choice":
            message.choice.texts.extend(params.choice.choices)
        case "grammar":
            text = "GBNF or EBNF (::=) is not supported: write the grammar in Lark"
            check.require(f"{_PARAMS}.grammar", "::=" not in params.grammar, text)
            message.lark = params.grammar
        case _:
            setattr(message, kind, getattr(params, kind))
    return parse_constraint(check, message)


def _end_ids(check: ViolationCollector, params: Message, model: ModelInfo) -> tuple[int, ...]:
    """Return the tokens that none of the first ``min_tokens`` may be; check that there is one."""
    least = params.min_tokens
    if not least:
        return ()
    field = f"{_PARAMS}.min_tokens"
    is_over = params.HasField("max_tokens") and least > params.max_tokens
    check.require(field, not is_over, f"{least} is more than max_tokens, {params.max_tokens}")
    ends = frozenset[int]() if params.ignore_eos else model.eos_token_ids
    found = sorted(i for i in ends.union(params.stop_token_ids) if 0 <= i < model.vocab_size)
    text = "every token of the vocabulary ends the text"
    check.require(field, len(found) < model.vocab_size, text)
    return tuple(found)


def _sampling(params: Message, end_ids: tuple[int, ...]) -> Sampling:
    return Sampling(
        temperature=params.temperature if params.HasField("temperature") else _TEMPERATURE,
        top_p=params.top_p or 1.0,
        min_p=params.min_p,
        top_k=params.top_k,
        repeat_penalty=params.repetition_penalty or 1.0,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        # As in OpenAI's API and vLLM.
        counts_output_only=True,
        seed=params.seed if params.HasField("seed") else secrets.randbits(63),
        logit_bias=tuple(params.logit_bias.items()),
        logprobs=params.logprobs if params.HasField("logprobs") else None,
        min_predict=params.min_tokens,
        end_ids=end_ids,
        prompt_logprobs=params.prompt_logprobs if params.HasField("prompt_logprobs") else None,
    )
