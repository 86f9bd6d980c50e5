"""Validation of requests against the ranges stated in the protocol.

Everything that could raise inside a step of the batch is refused here, before the request is
queued, with the name of the field.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.contract import (
    KV_BITS,
    MAX_ABORTED_IDS,
    MAX_ADAPTER_NAME_CHARS,
    MAX_ADAPTERS,
    MAX_BYTES,
    MAX_CACHE_SALT_CHARS,
    MAX_CONTEXT_LENGTH,
    MAX_DRAIN_SECONDS,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_LOGPROBS,
    MAX_MODEL_CHARS,
    MAX_PARALLEL,
    MAX_PRIORITY,
    MAX_REQUEST_ID_CHARS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
    MAX_WATCH_SECONDS,
    MIN_CONTEXT_LENGTH,
    MIN_WATCH_SECONDS,
)
from runner_server.api.constraints import parse_constraint
from runner_server.api.generation import GenerationDraft
from runner_server.api.prompts import Prompt
from runner_server.api.violations import ViolationCollector
from runner_server.engine.adapters import AdapterSpec
from runner_server.engine.types import CachePolicy, Dtype, LoadSpec, ModelInfo, Sampling

_T = TypeVar("_T")

MAX_INT32 = 2**31 - 1
_MAX_STOP_CHARS = 1024
_NANOS = 1_000_000_000

_MOST_NAMES = 8
"""Most adapters that a refusal names, so that its details stay below 2 KB."""

_DTYPES = {
    pb.DTYPE_UNSPECIFIED: Dtype.AUTO,
    pb.DTYPE_AUTO: Dtype.AUTO,
    pb.DTYPE_AS_STORED: Dtype.AS_STORED,
    pb.DTYPE_FLOAT32: Dtype.FLOAT32,
    pb.DTYPE_BFLOAT16: Dtype.BFLOAT16,
    pb.DTYPE_FLOAT16: Dtype.FLOAT16,
    pb.DTYPE_AUTO_OR_STORED: Dtype.AUTO_OR_STORED,
}


def load_spec(request: pb.LoadRequest | pb.EstimateRequest) -> LoadSpec:
    """Validate a request to load a model or to estimate a load.

    Raises:
        InvalidField: A field is missing or out of range.
    """
    check = ViolationCollector()
    check.require("model", bool(request.model), "required: a directory or a hub id")
    for name in ("model", "draft_model"):
        value = getattr(request, name)
        is_short = len(value) <= MAX_MODEL_CHARS and "\0" not in value
        check.require(name, is_short, f"at most {MAX_MODEL_CHARS} characters, none of them NUL")
    _check_number(check, request, "context_length", MIN_CONTEXT_LENGTH, MAX_CONTEXT_LENGTH)
    _check_number(check, request, "parallel", 1, MAX_PARALLEL)
    _check_number(check, request, "memory_limit_bytes", 1, MAX_BYTES)
    _check_number(check, request, "prefix_cache_bytes", 0, MAX_BYTES)
    known = request.dtype in _DTYPES
    check.require("dtype", known, f"{request.dtype} is not a dtype that this server supports")
    allowed = ", ".join(map(str, KV_BITS))
    check.require("kv_bits", request.kv_bits in KV_BITS, f"{request.kv_bits} is none of {allowed}")
    _check_adapters(check, request.adapters)
    check.finish()
    plain = LoadSpec(request.model)
    return LoadSpec(
        model=request.model,
        context_length=_given(request, "context_length", int, plain.context_length),
        parallel=_given(request, "parallel", int, plain.parallel),
        dtype=_DTYPES[request.dtype],
        memory_limit_bytes=_given(request, "memory_limit_bytes", int, plain.memory_limit_bytes),
        prefix_cache_bytes=_given(request, "prefix_cache_bytes", int, plain.prefix_cache_bytes),
        memory_override=isinstance(request, pb.LoadRequest) and request.memory_override,
        allow_inexact=request.allow_inexact,
        kv_bits=request.kv_bits,
        adapters=tuple(AdapterSpec(each.name, each.path) for each in request.adapters),
        draft_model=request.draft_model,
    )


def _check_adapters(check: ViolationCollector, adapters: Sequence[pb.Adapter]) -> None:
    text = f"{len(adapters)}; at most {MAX_ADAPTERS}"
    check.require("adapters", len(adapters) <= MAX_ADAPTERS, text)
    seen: set[str] = set()
    for i, adapter in enumerate(adapters[:MAX_ADAPTERS]):
        inside = 1 <= len(adapter.name) <= MAX_ADAPTER_NAME_CHARS
        text = f"{len(adapter.name)} characters; 1 to {MAX_ADAPTER_NAME_CHARS}"
        check.require(f"adapters[{i}].name", inside, text)
        text = "another adapter has the same name"
        check.require(f"adapters[{i}].name", adapter.name not in seen, text)
        seen.add(adapter.name)
        usable = 1 <= len(adapter.path) <= MAX_MODEL_CHARS and "\0" not in adapter.path
        text = f"required: a directory; at most {MAX_MODEL_CHARS} characters, none of them NUL"
        check.require(f"adapters[{i}].path", usable, text)


def trim_bytes(request: pb.TrimRequest) -> int:
    """Validate a trim request; return the size in bytes to reduce the prefix cache to.

    Raises:
        InvalidField: The size is negative.
    """
    check = ViolationCollector()
    _check_number(check, request, "prefix_cache_bytes", 0, MAX_BYTES)
    check.finish()
    return request.prefix_cache_bytes


def abort_ids(request: pb.AbortRequest) -> frozenset[str]:
    """Validate an abort request; return the names of the requests to end.

    Raises:
        InvalidField: There is no name, there are too many, or one is empty or too long.
    """
    check = ViolationCollector()
    ids = request.request_ids
    counts = 1 <= len(ids) <= MAX_ABORTED_IDS
    check.require("request_ids", counts, f"{len(ids)} ids; 1 to {MAX_ABORTED_IDS}")
    for i, name in enumerate(ids[:MAX_ABORTED_IDS]):
        inside = 1 <= len(name) <= MAX_REQUEST_ID_CHARS
        text = f"{len(name)} characters; 1 to {MAX_REQUEST_ID_CHARS}"
        check.require(f"request_ids[{i}]", inside, text)
    check.finish()
    return frozenset(ids)


def drain_seconds(request: pb.DrainRequest) -> float | None:
    """Validate a drain request; return its timeout, None for no limit.

    Raises:
        InvalidField: The timeout is out of range.
    """
    if not request.HasField("timeout"):
        return None
    return _seconds("timeout", request.timeout, 0, MAX_DRAIN_SECONDS)


def watch_interval(request: pb.WatchStatusRequest) -> float | None:
    """Validate a request to watch the status; return the interval in seconds, if there is one.

    Raises:
        InvalidField: The interval is out of range, or its parts are.
    """
    if not request.HasField("interval"):
        return None
    return _seconds("interval", request.interval, MIN_WATCH_SECONDS, MAX_WATCH_SECONDS)


def _seconds(field: str, duration: Duration, low: float, high: float) -> float:
    """Return the length of a duration in seconds, whose range begins at 0 or above."""
    length = duration.seconds + duration.nanos / _NANOS
    inside = 0 <= duration.nanos < _NANOS and low <= length <= high
    check = ViolationCollector()
    text = f"{length:g} s is not in the range {low:g} s to {high:g} s"
    check.require(field, inside, text)
    check.finish()
    return length


def completion_draft(request: pb.CompletionRequest, model: ModelInfo) -> GenerationDraft:
    """Validate a completion, except for the prompt's tokens, and fill in the defaults.

    Raises:
        InvalidField: A field is missing or out of range.
    """
    check = ViolationCollector()
    prompt = _prompt(check, request)
    _check_number(check, request, "prompt_logprobs", 0, min(MAX_LOGPROBS, model.vocab_size))
    draft = generation_draft(check, request, prompt, model)
    if not request.HasField("prompt_logprobs"):
        return draft
    return replace(
        draft,
        sampling=replace(draft.sampling, prompt_logprobs=request.prompt_logprobs),
        # They need the logits of every token, which the cache does not have.
        cache_policy=replace(draft.cache_policy, reads=False),
    )


def generation_draft(
    check: ViolationCollector,
    request: pb.CompletionRequest | pb.ChatRequest,
    prompt: Prompt,
    model: ModelInfo,
) -> GenerationDraft:
    """Validate the fields that completions and conversations share; fill in the defaults.

    Args:
        check: The violations found in other fields so far.
        request: The request.
        prompt: Its prompt.
        model: The model.

    Raises:
        InvalidField: A field is missing or out of range, or ``check`` has a violation.
    """
    options = request.options
    _check_numbers(check, options, model)
    check_stops(check, "options.stop", options.stop)
    check.bias("options.logit_bias", options.logit_bias, model.vocab_size)
    stop_ids = options.stop_token_ids
    check.token_ids("options.stop_token_ids", stop_ids, model.vocab_size, MAX_STOP_TOKEN_IDS)
    _check_least(check, options, model)
    _check_number(check, request, "logprobs", 0, min(MAX_LOGPROBS, model.vocab_size))
    wanted = request.logprob_token_ids
    check.token_ids("logprob_token_ids", wanted, model.vocab_size, MAX_LOGPROB_TOKEN_IDS)
    check_request_id(check, request.request_id)
    check.number("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY)
    salt = len(request.cache_salt)
    too_long = f"{salt} characters; at most {MAX_CACHE_SALT_CHARS}"
    check.require("cache_salt", salt <= MAX_CACHE_SALT_CHARS, too_long)
    _check_adapter(check, request.adapter, model)
    constraint = None
    if request.HasField("constraint"):
        constraint = parse_constraint(check, request.constraint)
        check_ends(check, options)
    check.finish()
    uses_cache = not request.bypass_prefix_cache
    return GenerationDraft(
        prompt=prompt,
        max_tokens=_given(options, "num_predict", int, model.context_length),
        sampling=_sampling(request, model),
        stop=tuple(options.stop),
        stop_token_ids=frozenset(stop_ids),
        ignore_eos=options.ignore_eos,
        request_id=request.request_id,
        priority=request.priority,
        cache_policy=CachePolicy(reads=uses_cache, writes=uses_cache, salt=request.cache_salt),
        constraint=constraint,
        adapter=request.adapter,
    )


def _check_adapter(check: ViolationCollector, name: str, model: ModelInfo) -> None:
    """Check that the adapter is one of the model's."""
    names = [adapter.name for adapter in model.adapters]
    if not name or name in names:
        return
    shown = ", ".join(repr(each) for each in names[:_MOST_NAMES])
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    loaded = f"it has {shown}{more}" if names else "it was loaded without any"
    text = f"the loaded model has no adapter {name[:MAX_ADAPTER_NAME_CHARS]!r}: {loaded}"
    check.require("adapter", ok=False, text=text)


def check_ends(check: ViolationCollector, options: pb.CompletionOptions) -> None:
    """Check that the end of the text is left to the constraint."""
    text = "cannot be combined with a constraint or required calls, which say where the text ends"
    check.require("options.ignore_eos", not options.ignore_eos, text)
    check.require("options.min_predict", options.min_predict <= 0, text)


def check_request_id(check: ViolationCollector, request_id: str) -> None:
    """Check the length of the caller's name for a request."""
    length = len(request_id)
    too_long = f"{length} characters; at most {MAX_REQUEST_ID_CHARS}"
    check.require("request_id", length <= MAX_REQUEST_ID_CHARS, too_long)


def _prompt(check: ViolationCollector, request: pb.CompletionRequest) -> Prompt:
    """Return the prompt; record a missing or empty prompt as a violation."""
    match request.WhichOneof("input"):
        case "prompt":
            check.require("prompt", bool(request.prompt), "the prompt is empty")
            return Prompt("prompt", request.prompt, request.literal)
        case "prompt_token_ids":
            ids = request.prompt_token_ids.ids
            check.require("prompt_token_ids", bool(ids), "the prompt is empty")
            check.require("literal", not request.literal, "only a text can be literal")
            return Prompt("prompt_token_ids.ids", ids)
        case _:
            check.require("input", ok=False, text="required: prompt or prompt_token_ids")
            return Prompt("input", "")


def _check_numbers(
    check: ViolationCollector, options: pb.CompletionOptions, model: ModelInfo
) -> None:
    _check_number(check, options, "temperature", 0, 100)
    _check_number(check, options, "top_p", 0, 1, above=True)
    _check_number(check, options, "min_p", 0, 1)
    _check_number(check, options, "top_k", 0, model.vocab_size)
    _check_number(check, options, "repeat_last_n", -1, MAX_INT32)
    _check_number(check, options, "repeat_penalty", 0.01, 100)
    _check_number(check, options, "presence_penalty", -100, 100)
    _check_number(check, options, "frequency_penalty", -100, 100)
    _check_number(check, options, "num_predict", 1, MAX_INT32)


def _check_least(
    check: ViolationCollector, options: pb.CompletionOptions, model: ModelInfo
) -> None:
    """Check ``min_predict``, and that it can be met."""
    least, field = options.min_predict, "options.min_predict"
    check.number(field, least, 0, MAX_INT32)
    most = options.num_predict
    is_over = options.HasField("num_predict") and least > max(0, most)
    check.require(field, not is_over, f"{least} is more than num_predict, which is {most}")
    only_ends = least > 0 and len(_end_ids(options, model)) == model.vocab_size
    check.require(field, not only_ends, "every token of the vocabulary ends the text")


def _end_ids(options: pb.CompletionOptions, model: ModelInfo) -> list[int]:
    """Return the tokens of the model's vocabulary that end the text, in order."""
    model_end_ids = frozenset[int]() if options.ignore_eos else model.eos_token_ids
    ids = model_end_ids.union(options.stop_token_ids)
    return sorted(id_ for id_ in ids if 0 <= id_ < model.vocab_size)


def _check_number(
    check: ViolationCollector,
    message: Message,
    field: str,
    low: float,
    high: float,
    *,
    above: bool = False,
) -> None:
    """Check the range of a field if set."""
    if message.HasField(field):
        check.number(_path(message, field), getattr(message, field), low, high, above=above)


def check_stops(check: ViolationCollector, field: str, stops: Sequence[str]) -> None:
    """Check the number of stop strings and their lengths."""
    if len(stops) > MAX_STOPS:
        # A message can have millions; checking each would block the event loop.
        check.require(field, ok=False, text=f"{len(stops)}; at most {MAX_STOPS}")
        return
    for i, stop in enumerate(stops):
        inside = 1 <= len(stop) <= _MAX_STOP_CHARS
        text = f"{len(stop)} characters; 1 to {_MAX_STOP_CHARS}"
        check.require(f"{field}[{i}]", inside, text)


def _sampling(request: pb.CompletionRequest | pb.ChatRequest, model: ModelInfo) -> Sampling:
    options = request.options
    given = partial(_given, options)
    plain = Sampling()
    return Sampling(
        temperature=given("temperature", float, plain.temperature),
        top_p=given("top_p", float, plain.top_p),
        min_p=given("min_p", float, plain.min_p),
        top_k=given("top_k", int, min(plain.top_k, model.vocab_size)),
        repeat_last_n=given("repeat_last_n", int, plain.repeat_last_n),
        repeat_penalty=given("repeat_penalty", float, plain.repeat_penalty),
        presence_penalty=given("presence_penalty", float, plain.presence_penalty),
        frequency_penalty=given("frequency_penalty", float, plain.frequency_penalty),
        counts_output_only=options.penalize_output_only,
        seed=given("seed", int, secrets.randbits(63)),
        logit_bias=tuple(options.logit_bias.items()),
        logprobs=request.logprobs if _wants_logprobs(request) else None,
        min_predict=options.min_predict,
        end_ids=tuple(_end_ids(options, model)) if options.min_predict else (),
        logprob_token_ids=tuple(request.logprob_token_ids),
    )


def _wants_logprobs(request: pb.CompletionRequest | pb.ChatRequest) -> bool:
    return request.HasField("logprobs") or bool(request.logprob_token_ids)


def _given(message: Message, field: str, convert: Callable[[float], _T], default: _T) -> _T:
    return convert(getattr(message, field)) if message.HasField(field) else default


def _path(message: Message, field: str) -> str:
    return f"options.{field}" if isinstance(message, pb.CompletionOptions) else field
