"""Drafts of completions: defaults, violations, and the fit of a tokenized prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.api.generation import GenerationDraft
from runner_server.api.prompts import Prompt
from runner_server.api.validation import completion_draft
from runner_server.engine.types import CachePolicy, Sampling
from runner_server.errors import InvalidField, PromptTooLong
from support.fakes import EOS, VOCAB_SIZE, model_info

MODEL = replace(model_info(), context_length=16)

TEXT = Prompt("prompt", "hello")
IDS = Prompt("prompt_token_ids.ids", [1, 2, 3])


def text_request(**options: Any) -> pb.CompletionRequest:
    return pb.CompletionRequest(prompt="hello", options=pb.CompletionOptions(**options))


def ids_request(*ids: int) -> pb.CompletionRequest:
    return pb.CompletionRequest(prompt_token_ids=pb.TokenIds(ids=ids))


def draft(prompt: Prompt = TEXT, **changes: Any) -> GenerationDraft:
    return replace(GenerationDraft(prompt, max_tokens=16, sampling=Sampling()), **changes)


def violations(request: pb.CompletionRequest) -> list[str]:
    """Return the fields named in the refusal of a request."""
    with pytest.raises(InvalidField) as refused:
        completion_draft(request, MODEL)
    return [field for field, _ in refused.value.violations]


def test_a_text_prompt_keeps_its_field_and_text() -> None:
    assert completion_draft(text_request(), MODEL).prompt == TEXT


def test_a_prompt_of_ids_keeps_its_field_and_ids() -> None:
    prompt = completion_draft(ids_request(1, 2, 3), MODEL).prompt
    assert (prompt.field, list(prompt.content)) == (IDS.field, IDS.content)


def test_unset_options_get_the_defaults_of_the_loaded_model() -> None:
    model = replace(MODEL, vocab_size=10)
    parsed = completion_draft(text_request(), model)
    assert parsed.max_tokens == model.context_length
    assert parsed.sampling == Sampling(top_k=10, seed=parsed.sampling.seed)
    assert (parsed.stop, parsed.stop_token_ids, parsed.ignore_eos) == ((), frozenset(), False)
    assert parsed.request_id == ""


def test_requests_without_a_seed_get_different_seeds() -> None:
    seeds = {completion_draft(text_request(), MODEL).sampling.seed for _ in range(4)}
    assert len(seeds) == 4


def test_set_options_are_kept() -> None:
    request = text_request(num_predict=5, seed=7, top_k=0, stop=["a", "b"])
    request.request_id, request.logprobs = "mine", 2
    parsed = completion_draft(request, MODEL)
    assert (parsed.max_tokens, parsed.stop, parsed.request_id) == (5, ("a", "b"), "mine")
    assert parsed.sampling == Sampling(top_k=0, seed=7, logprobs=2)


def test_the_first_tokens_that_must_not_end_the_text_name_all_that_would() -> None:
    model = replace(MODEL, eos_token_ids=frozenset({EOS, 3, VOCAB_SIZE, -1}))
    request = text_request(min_predict=2, stop_token_ids=[9, 7, 9])
    sampling = completion_draft(request, model).sampling
    # The output layer does not score the last two, so they cannot be drawn.
    assert (sampling.min_predict, sampling.end_ids) == (2, (3, 7, 9, EOS))
    request.options.ignore_eos = True
    assert completion_draft(request, model).sampling.end_ids == (7, 9)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"min_predict": 9, "num_predict": 8}, "9 is more than num_predict, which is 8"),
        (
            {"min_predict": 1, "stop_token_ids": range(MODEL.vocab_size)},
            "every token of the vocabulary ends the text",
        ),
    ],
)
def test_a_minimum_that_cannot_be_met_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidField) as refused:
        completion_draft(text_request(**options), MODEL)
    assert refused.value.violations == [("options.min_predict", problem)]


def test_penalties_may_count_the_output_only() -> None:
    request = text_request(presence_penalty=1.0, penalize_output_only=True)
    assert completion_draft(request, MODEL).sampling.counts_output_only
    assert not completion_draft(text_request(), MODEL).sampling.counts_output_only


@pytest.mark.parametrize("most", [8, 9])
def test_a_minimum_up_to_the_maximum_is_accepted(most: int) -> None:
    request = text_request(min_predict=8, num_predict=most)
    assert completion_draft(request, MODEL).sampling.min_predict == 8


def test_a_request_uses_the_prefix_cache_unless_it_bypasses_it() -> None:
    request = text_request()
    assert completion_draft(request, MODEL).cache_policy == CachePolicy()
    request.bypass_prefix_cache = True
    request.cache_salt = "mine"
    policy = CachePolicy(reads=False, writes=False, salt="mine")
    assert completion_draft(request, MODEL).cache_policy == policy


def test_a_prompt_with_log_probabilities_takes_nothing_from_the_prefix_cache() -> None:
    request = text_request()
    request.prompt_logprobs = 0
    parsed = completion_draft(request, MODEL)
    assert parsed.sampling.prompt_logprobs == 0
    assert parsed.cache_policy == CachePolicy(reads=False)


def test_a_draft_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        draft().max_tokens = 1  # type: ignore[misc]


def test_a_refusal_names_all_invalid_fields_at_once() -> None:
    request = pb.CompletionRequest(
        options=pb.CompletionOptions(
            temperature=-1, num_predict=0, stop=[""], logit_bias={VOCAB_SIZE: 1.0}
        ),
        logprobs=1000,
        request_id="x" * 129,
    )
    assert violations(request) == [
        "input",
        "options.temperature",
        "options.num_predict",
        "options.stop[0]",
        f"options.logit_bias[{VOCAB_SIZE}]",
        "logprobs",
        "request_id",
    ]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.CompletionRequest(), "input"),
        (pb.CompletionRequest(prompt=""), "prompt"),
        (ids_request(), "prompt_token_ids"),
    ],
)
def test_a_missing_or_empty_prompt_is_refused(request_: pb.CompletionRequest, field: str) -> None:
    assert violations(request_) == [field]


def test_invalid_options_are_refused_before_the_length_of_the_prompt() -> None:
    request = ids_request(*[1] * 1000)
    request.options.top_p = 2
    assert violations(request) == ["options.top_p"]


@pytest.mark.parametrize(
    ("wanted", "length", "most"), [(16, 3, 13), (5, 3, 5), (2**31 - 1, 3, 13), (16, 15, 1)]
)
def test_the_output_is_limited_to_the_room_in_the_context(
    wanted: int, length: int, most: int
) -> None:
    assert draft(max_tokens=wanted).fit([1] * length, MODEL).max_tokens == most


def test_a_fitted_draft_keeps_everything_but_the_request_id() -> None:
    sampling = Sampling(seed=3, logprobs=1)
    drafted = draft(
        IDS,
        sampling=sampling,
        stop=("a",),
        stop_token_ids=frozenset({4}),
        ignore_eos=True,
        request_id="mine",
        cache_policy=CachePolicy(writes=False),
    )
    spec = drafted.fit([1, 2, 3], MODEL)
    assert spec.prompt_ids == (1, 2, 3)
    assert (spec.sampling, spec.stop) == (sampling, ("a",))
    assert (spec.stop_token_ids, spec.ignore_eos) == (frozenset({4}), True)
    assert spec.cache_policy == CachePolicy(writes=False)


def test_a_prompt_that_fills_the_context_is_too_long() -> None:
    with pytest.raises(PromptTooLong):
        draft().fit([1] * 16, MODEL)


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(InvalidField) as refused:
        draft().fit([], MODEL)
    assert refused.value.violations == [("prompt", "the prompt has no tokens")]


@pytest.mark.parametrize(
    ("prompt", "ids", "field", "text"),
    [
        (IDS, [1, VOCAB_SIZE], "prompt_token_ids.ids[1]", "is not a token id"),
        (IDS, [-1, 1], "prompt_token_ids.ids[0]", "-1 is not a token id"),
        (TEXT, [1, VOCAB_SIZE], "prompt", "the tokenizer produces token"),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(
    prompt: Prompt, ids: Sequence[int], field: str, text: str
) -> None:
    with pytest.raises(InvalidField) as refused:
        draft(prompt).fit(ids, MODEL)
    ((named, problem),) = refused.value.violations
    assert named == field
    assert text in problem


def test_the_length_of_a_prompt_is_refused_before_its_token_ids() -> None:
    with pytest.raises(PromptTooLong):
        draft(IDS).fit([-1] * 16, MODEL)
