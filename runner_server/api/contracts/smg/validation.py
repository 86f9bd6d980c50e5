"""Validation of the gateway's requests.

Fields without presence (``top_p``, ``repetition_penalty``) have the value 0 if unset.
"""

from __future__ import annotations

import secrets
from typing import Any

from runner_common.contract import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS
from runner_server.api.contracts.prompts import read_prompt
from runner_server.api.generation import GenerationDraft
from runner_server.api.validation import MAX_INT32, check_request_id
from runner_server.api.violations import ViolationCollector
from runner_server.engine.types import ModelInfo, Sampling

# The stubs are untyped, because their package has no py.typed.
Message = Any

_TEMPERATURE = 1.0
"""Default temperature, as in OpenAI's API, which the gateway offers to its own callers."""


def generate_draft(request: Message, model: ModelInfo) -> GenerationDraft:
    """Validate a request, except for the prompt's tokens, and fill in the defaults.

    Raises:
        InvalidField: A field is missing or out of range.
    """
    check = ViolationCollector()
    params = request.sampling_params
    prompt = read_prompt(check, request)
    check_request_id(check, request.request_id)
    _check_numbers(check, params, model)
    check.bias("sampling_params.logit_bias", params.logit_bias, model.vocab_size)
    check.token_ids(
        "sampling_params.stop_token_ids",
        params.stop_token_ids,
        model.vocab_size,
        MAX_STOP_TOKEN_IDS,
    )
    check.finish()
    return GenerationDraft(
        prompt=prompt,
        max_tokens=params.max_tokens if params.HasField("max_tokens") else model.context_length,
        sampling=_sampling(params),
        stop_token_ids=frozenset(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        request_id=request.request_id,
    )


def _check_numbers(check: ViolationCollector, params: Message, model: ModelInfo) -> None:
    def number(field: str, low: float, high: float) -> None:
        check.number(f"sampling_params.{field}", getattr(params, field), low, high)

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
    number("logprobs", 0, min(MAX_LOGPROBS, model.vocab_size))


def _sampling(params: Message) -> Sampling:
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
    )
