"""Requests of calls, from arguments that were checked for their types."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from mlxrunner.v1 import runner_pb2 as pb
from runner_client.checks import (
    check_flag,
    check_ids,
    check_integer,
    check_kind,
    check_model,
    check_seconds,
    check_text,
    check_texts,
    refuse_type,
)
from runner_client.errors import InvalidRequestError
from runner_client.types import (
    Choice,
    Constraint,
    JsonObject,
    JsonSchema,
    LarkGrammar,
    Options,
    Regex,
)
from runner_common.contract import MAX_DRAIN_SECONDS, MAX_WATCH_SECONDS, MIN_WATCH_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from runner_client.types import LoadOptions

_DTYPES = {
    "auto": pb.DTYPE_AUTO,
    "auto_or_stored": pb.DTYPE_AUTO_OR_STORED,
    "as_stored": pb.DTYPE_AS_STORED,
    "float32": pb.DTYPE_FLOAT32,
    "bfloat16": pb.DTYPE_BFLOAT16,
    "float16": pb.DTYPE_FLOAT16,
}

_CONSTRAINT_FORM = "a JsonSchema, JsonObject, Regex, LarkGrammar or Choice"


def load_request(model: str, options: LoadOptions) -> pb.LoadRequest:
    """Build the request of a load.

    Raises:
        TypeError: The model is not a string.
        InvalidRequestError: A value cannot be sent.
    """
    check_model(model)
    with sendable():
        return pb.LoadRequest(
            model=model,
            context_length=options.context_length,
            parallel=options.parallel,
            dtype=_DTYPES[options.dtype],
            memory_limit_bytes=options.memory_limit_bytes,
            prefix_cache_bytes=options.prefix_cache_bytes,
            memory_override=options.memory_override,
            allow_inexact=options.allow_inexact,
            kv_bits=options.kv_bits,
            adapters=_adapters(options),
            draft_model=options.draft_model or "",
        )


def estimate_request(model: str, options: LoadOptions) -> pb.EstimateRequest:
    """Build the request of an estimate, with the errors of ``load_request``."""
    check_model(model)
    with sendable():
        return pb.EstimateRequest(
            model=model,
            context_length=options.context_length,
            parallel=options.parallel,
            dtype=_DTYPES[options.dtype],
            memory_limit_bytes=options.memory_limit_bytes,
            prefix_cache_bytes=options.prefix_cache_bytes,
            allow_inexact=options.allow_inexact,
            kv_bits=options.kv_bits,
            adapters=_adapters(options),
            draft_model=options.draft_model or "",
        )


def _adapters(options: LoadOptions) -> list[pb.Adapter]:
    return [pb.Adapter(name=name, path=path) for name, path in options.adapters.items()]


def trim_request(prefix_cache_bytes: int | None, model: str | None) -> pb.TrimRequest:
    """Build the request of a trim, with the errors of ``completion_request``."""
    check_integer("prefix_cache_bytes", prefix_cache_bytes)
    with sendable():
        return pb.TrimRequest(prefix_cache_bytes=prefix_cache_bytes, model=named(model))


def unload_request(model: str | None) -> pb.UnloadRequest:
    """Build the request of an unload, with the errors of ``completion_request``."""
    with sendable():
        return pb.UnloadRequest(model=named(model))


def status_request(model: str | None) -> pb.StatusRequest:
    """Build the request of a status, with the errors of ``completion_request``."""
    with sendable():
        return pb.StatusRequest(model=named(model))


def watch_request(interval_seconds: float | None, model: str | None) -> pb.WatchStatusRequest:
    """Build the request to watch the status.

    Raises:
        TypeError: The interval is not a number, or the model is not a text.
        InvalidRequestError: The interval is out of range, or the name cannot be sent.
    """
    check_seconds("interval_seconds", interval_seconds, MIN_WATCH_SECONDS, MAX_WATCH_SECONDS)
    with sendable():
        request = pb.WatchStatusRequest(model=named(model))
    if interval_seconds is not None:
        request.interval.FromNanoseconds(round(interval_seconds * 1e9))
    return request


def completion_request(
    prompt: str | Sequence[int],
    *,
    options: Options | None = None,
    logprobs: int | None = None,
    request_id: str = "",
    priority: int = 0,
    model: str | None = None,
    bypass_prefix_cache: bool = False,
    cache_salt: str = "",
    literal: bool = False,
    logprob_token_ids: Sequence[int] = (),
    prompt_logprobs: int | None = None,
    constraint: Constraint | None = None,
    adapter: str = "",
) -> pb.CompletionRequest:
    """Build the request of a completion from text or token ids.

    Raises:
        TypeError: A value is of the wrong type.
        InvalidRequestError: A value cannot be sent.
    """
    if not isinstance(prompt, str):
        check_ids("prompt", prompt, "text (str) or a sequence of token ids")
    check_kind("options", options, Options)
    check_integer("logprobs", logprobs)
    check_text("request_id", request_id)
    check_integer("priority", priority)
    check_flag("bypass_prefix_cache", bypass_prefix_cache)
    check_text("cache_salt", cache_salt)
    check_text("adapter", adapter)
    check_flag("literal", literal)
    check_ids("logprob_token_ids", logprob_token_ids)
    check_integer("prompt_logprobs", prompt_logprobs)
    if constraint is not None and not isinstance(constraint, Constraint):
        refuse_type("constraint", constraint, _CONSTRAINT_FORM)
    with sendable():
        message = pb.CompletionRequest(
            options=_options(options or Options()),
            logprobs=logprobs,
            request_id=request_id,
            priority=priority,
            model=named(model),
            bypass_prefix_cache=bypass_prefix_cache,
            cache_salt=cache_salt,
            literal=literal,
            logprob_token_ids=logprob_token_ids,
            prompt_logprobs=prompt_logprobs,
            constraint=_constraint(constraint) if constraint else None,
            adapter=adapter,
        )
        if isinstance(prompt, str):
            message.prompt = prompt
        else:
            message.prompt_token_ids.CopyFrom(pb.TokenIds(ids=prompt))
        return message


def abort_request(request_ids: Sequence[str]) -> pb.AbortRequest:
    """Build the request of an abort, with the errors of ``completion_request``."""
    check_texts("request_ids", request_ids)
    with sendable():
        return pb.AbortRequest(request_ids=request_ids)


def drain_request(timeout_seconds: float | None) -> pb.DrainRequest:
    """Build the request of a drain, with the errors of ``completion_request``."""
    check_seconds("timeout_seconds", timeout_seconds, 0, MAX_DRAIN_SECONDS)
    request = pb.DrainRequest()
    if timeout_seconds is not None:
        request.timeout.FromNanoseconds(round(timeout_seconds * 1e9))
    return request


def tokenize_request(
    content: str, *, add_special_tokens: bool, model: str | None, literal: bool
) -> pb.TokenizeRequest:
    """Build the request to tokenize a text, with the errors of ``completion_request``."""
    check_text("content", content)
    check_flag("add_special_tokens", add_special_tokens)
    check_flag("literal", literal)
    with sendable():
        return pb.TokenizeRequest(
            content=content,
            add_special_tokens=add_special_tokens,
            model=named(model),
            literal=literal,
        )


def detokenize_request(token_ids: Sequence[int], model: str | None) -> pb.DetokenizeRequest:
    """Build the request to join token ids, with the errors of ``completion_request``."""
    check_ids("token_ids", token_ids)
    with sendable():
        return pb.DetokenizeRequest(token_ids=token_ids, model=named(model))


def named(model: str | None) -> str:
    """Return the name of a model in a request; empty for any.

    Raises:
        TypeError: The model is not a string.
    """
    if model is not None:
        check_model(model)
    return model or ""


@contextmanager
def sendable() -> Iterator[None]:
    """Translate errors of protobuf, such as integer overflow or lone surrogates.

    Raises:
        InvalidRequestError: The block raised ``ValueError``.
    """
    try:
        yield
    except ValueError as error:
        raise InvalidRequestError(
            f"the request cannot be sent: {error}; counts and token ids must fit 32 bits, "
            "and text must not contain lone surrogates"
        ) from error


def _constraint(constraint: Constraint) -> pb.Constraint:
    match constraint:
        case JsonSchema():
            return pb.Constraint(json_schema=constraint.text)
        case JsonObject():
            return pb.Constraint(json_object=pb.JsonObject())
        case Regex(pattern):
            return pb.Constraint(regex=pattern)
        case LarkGrammar(grammar):
            return pb.Constraint(lark=grammar)
        case Choice(texts):
            return pb.Constraint(choice=pb.Choice(texts=texts))


def _options(options: Options) -> pb.CompletionOptions:
    return pb.CompletionOptions(
        temperature=options.temperature,
        top_p=options.top_p,
        min_p=options.min_p,
        top_k=options.top_k,
        repeat_last_n=options.repeat_last_n,
        repeat_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        num_predict=options.num_predict,
        seed=options.seed,
        stop=options.stop,
        logit_bias=options.logit_bias,
        stop_token_ids=options.stop_token_ids,
        ignore_eos=options.ignore_eos,
        min_predict=options.min_predict,
        penalize_output_only=options.penalize_output_only,
    )
