"""Length and distinctness of prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tokenizers", reason="no tokenizers (the server extra)")

from bench.prompts import Prompts
from bench.vocabulary import write_tokenizer

_VOCAB_SIZE = 1000


@pytest.fixture
def prompts(tmp_path: Path) -> Prompts:
    write_tokenizer(tmp_path, _VOCAB_SIZE)
    return Prompts(tmp_path)


def test_a_prompt_has_the_requested_number_of_tokens(prompts: Prompts) -> None:
    for count in (1, 8, 300):
        prompt = prompts.words(count)
        assert len(prompt.token_ids) == count
        assert max(prompt.token_ids) < _VOCAB_SIZE


def test_no_two_prompts_begin_alike(prompts: Prompts) -> None:
    beginnings = [prompts.words(2).token_ids[0] for _ in range(300)]
    assert len(set(beginnings)) == len(beginnings)


def test_prompts_share_only_the_given_beginning(prompts: Prompts) -> None:
    shared = prompts.words(20)
    one, other = (prompts.words(40, shared).token_ids for _ in range(2))
    assert one[:20] == other[:20] == shared.token_ids
    assert one[20:] != other[20:]


def test_prompts_are_the_same_in_every_run(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, _VOCAB_SIZE)
    first, second = (Prompts(tmp_path).words(50) for _ in range(2))
    assert first == second
