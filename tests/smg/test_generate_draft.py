"""Drafts of the gateway's requests: defaults and violations."""

from __future__ import annotations

from typing import Any

import pytest

from runner_server.api.prompts import Prompt
from runner_server.engine.types import Sampling
from runner_server.errors import InvalidField
from support.fakes import model_info

pytest.importorskip("smg_grpc_proto", reason="smg-grpc-proto is not installed (the extra smg)")

from smg_grpc_proto import mlx_engine_pb2 as pb

from runner_server.api.contracts.smg.validation import generate_draft

# The stubs have no types for mypy.
Message = Any

MODEL = model_info()


def text_request(**params: Any) -> Message:
    return pb.GenerateRequest(text="hello", sampling_params=pb.SamplingParams(**params))


def test_unset_options_get_the_defaults_of_the_gateway_and_the_model() -> None:
    parsed = generate_draft(text_request(), MODEL)
    assert parsed.prompt == Prompt("text", "hello")
    assert parsed.max_tokens == MODEL.context_length
    assert parsed.sampling == Sampling(
        temperature=1.0, top_p=1.0, top_k=0, counts_output_only=True, seed=parsed.sampling.seed
    )


def test_set_options_are_kept() -> None:
    request = pb.GenerateRequest(
        request_id="mine",
        tokenized=pb.TokenizedInput(input_ids=[1, 2]),
        sampling_params=pb.SamplingParams(max_tokens=5, stop_token_ids=[4], ignore_eos=True),
    )
    parsed = generate_draft(request, MODEL)
    assert (parsed.prompt.field, list(parsed.prompt.content)) == ("tokenized.input_ids", [1, 2])
    assert (parsed.max_tokens, parsed.request_id) == (5, "mine")
    assert (parsed.stop_token_ids, parsed.ignore_eos) == (frozenset({4}), True)


def test_a_refusal_names_all_invalid_fields_at_once() -> None:
    request = pb.GenerateRequest(
        request_id="x" * 129,
        sampling_params=pb.SamplingParams(
            temperature=-1, max_tokens=0, stop_token_ids=[MODEL.vocab_size]
        ),
    )
    with pytest.raises(InvalidField) as refused:
        generate_draft(request, MODEL)
    assert [field for field, _ in refused.value.violations] == [
        "input",
        "request_id",
        "sampling_params.temperature",
        "sampling_params.max_tokens",
        "sampling_params.stop_token_ids[0]",
    ]
