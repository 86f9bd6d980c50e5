"""Prompt lookup: which tokens followed the last ones before."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from runner_server.engine.speculation.prompt_lookup import MAX_MATCH, MIN_MATCH, PromptLookup

# Few different tokens, so that texts repeat themselves; large ones, whose bytes look like others'.
TOKENS = st.sampled_from([0, 1, 2, 256, 65536, 16777216])


def _is_copied(text: Sequence[int], ids: Sequence[int], matched: int) -> bool:
    """Return whether ``ids`` followed the last ``matched`` tokens somewhere before."""
    whole = [*text, *ids]
    pattern = text[-matched:]
    return any(
        # Beyond the end of the text, the prediction continues itself.
        list(text[at : at + matched]) == list(pattern)
        and all(whole[at + matched + index] == token for index, token in enumerate(ids))
        for at in range(len(text) - matched)
    )


def test_a_repeated_text_goes_on_as_before() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 9, 1, 2, 3])
    assert lookup.continuation(2) == (3, (4, 5))
    lookup.extend([4])
    assert lookup.continuation(3) == (4, (5, 9, 1))
    lookup.extend([7])
    assert lookup.continuation(3) == (0, ())


def test_the_last_of_several_places_is_followed() -> None:
    assert PromptLookup([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3]).continuation(1) == (3, (5,))


def test_a_period_is_continued() -> None:
    assert PromptLookup([1, 2] * 4).continuation(5) == (6, (1, 2, 1, 2, 1))


def test_a_token_that_looks_like_parts_of_two_is_no_match() -> None:
    # The bytes of 256 occur in those of (65536, 0), one byte off.
    assert PromptLookup([65536, 0, 0, 0, 7, 256, 0, 0]).continuation(1) == (0, ())


@given(st.lists(TOKENS, max_size=12), st.lists(st.lists(TOKENS, max_size=4), max_size=8))
@example([1, 2] * 40, [[1, 2]])
def test_what_is_predicted_has_followed_the_same_tokens(
    prompt: list[int], parts: list[list[int]]
) -> None:
    lookup = PromptLookup(prompt)
    text = list(prompt)
    for part in parts:
        lookup.extend(part)
        text += part
        matched, ids = lookup.continuation(4)
        assert len(lookup) == len(text)
        patterns = [text[at : at + MIN_MATCH] for at in range(len(text) - MIN_MATCH)]
        if text[-MIN_MATCH:] in patterns:
            assert len(ids) == 4
            assert _is_copied(text, ids, min(matched, MAX_MATCH))
        else:
            assert (matched, ids) == (0, ())
