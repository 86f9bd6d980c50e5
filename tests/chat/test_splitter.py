"""Division of answers by markers: independent of pieces, and like mlx_lm's state machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner_server.chat import gpt_oss
from runner_server.chat.answer import Answer, AnswerPart
from runner_server.chat.format import CONTENT, HEADER, REASONING, AnswerFormat, Transitions
from runner_server.chat.splitter import AnswerSplitter, Segment
from support.fakes import THINKING

SPARK: Transitions = {
    HEADER: (("to=self<|message|>", REASONING), ("to=user<|message|>", CONTENT)),
    REASONING: (("<|eom|>", HEADER),),
    CONTENT: (("<|eom|>", HEADER), ("<|eot|>", CONTENT)),
}
NESTED: Transitions = {CONTENT: (("abcd", REASONING), ("bc", HEADER)), HEADER: (("aa", CONTENT),)}
MACHINES: dict[str, tuple[Transitions, str]] = {
    "thinking": (THINKING.transitions, CONTENT),
    "opened by the prompt": (THINKING.transitions, REASONING),
    "spark": (SPARK, HEADER),
    "gpt-oss": (gpt_oss.FORMAT.transitions, HEADER),
    "nested markers": (NESTED, CONTENT),
    "no markers": ({}, CONTENT),
}
WORDS = ["<think>", "</think>", "<th", "ink>", "<", "abcd", "bc", "a", "<|eom|>", "é\n"]
WORDS += ["to=user<|message|>", "to=self<|message|>", "<|channel|>analysis", "<|message|>"]
WORDS += ["<|channel|>final<|message|>", "<|end|><|start|>assistant", "<|end|>", " to=functions.f"]

texts = st.lists(st.sampled_from(WORDS), max_size=12)


def split(machine: str, pieces: Iterable[str]) -> list[tuple[str, str]]:
    """Return the joined texts of consecutive states, without empty ones."""
    splitter = AnswerSplitter(*MACHINES[machine])
    found: list[tuple[str, str]] = []
    for part in [*(p for piece in pieces for p in splitter.feed(piece)), *splitter.flush()]:
        if found and found[-1][0] == part.state:
            found[-1] = (part.state, found[-1][1] + part.text)
        elif part.text:
            found.append((part.state, part.text))
    return found


@pytest.mark.parametrize("machine", MACHINES)
@given(words=texts, cuts=st.sets(st.integers(0, 80)))
def test_parts_do_not_depend_on_the_pieces(machine: str, words: list[str], cuts: set[int]) -> None:
    text = "".join(words)
    borders = [0, *sorted(cut for cut in cuts if 0 < cut < len(text)), len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    assert split(machine, pieces) == split(machine, [text]) == split(machine, text)


@pytest.mark.parametrize("machine", sorted(MACHINES.keys() - {"nested markers"}))
@given(words=texts)
def test_parts_are_those_of_mlx_lm(machine: str, words: list[str]) -> None:
    generate = pytest.importorskip("mlx_lm.generate", reason="mlx_lm is not installed")
    transitions, state = MACHINES[machine]
    theirs = generate.TextStateMachine({key: list(edges) for key, edges in transitions.items()})
    current, segments = generate.TextStateMachine.split(theirs.make_state(state), "".join(words))
    _, rest, last = generate.TextStateMachine.flush(current)
    expected: list[tuple[str, str]] = []
    for of, text in [*segments, (last, rest)]:
        if expected and expected[-1][0] == of:
            expected[-1] = (of, expected[-1][1] + text)
        elif text:
            expected.append((of, text))
    assert split(machine, ["".join(words)]) == expected


def test_text_that_may_begin_a_marker_is_held_back() -> None:
    splitter = AnswerSplitter(THINKING.transitions, CONTENT)
    assert list(splitter.feed("a<th")) == [Segment(CONTENT, "a")]
    assert list(splitter.feed("e")) == [Segment(CONTENT, "<the")]
    assert list(splitter.feed("<think")) == []
    assert list(splitter.flush()) == [Segment(CONTENT, "<think")]


async def read(prompt: str, tokens: Sequence[str]) -> tuple[AnswerPart, int]:
    """Return an answer and the count of its reasoning tokens, one token at a time."""
    answer = Answer(THINKING, prompt)
    parts = [await answer.add([token], is_last=False) for token in tokens]
    parts.append(await answer.add([], is_last=True))
    whole = AnswerPart("".join(p.content for p in parts), "".join(p.reasoning for p in parts))
    together = Answer(THINKING, prompt)
    assert await together.add(tokens, is_last=True) == whole
    assert together.reasoning_count == answer.reasoning_count
    return whole, answer.reasoning_count


async def test_the_tokens_of_reasoning_are_counted() -> None:
    tokens = ["<think>", "\n", "one", " and", "</think>", "\n", "Two", "."]
    assert await read("x", tokens) == (AnswerPart("\nTwo.", "\none and"), 5)


async def test_a_template_may_open_the_reasoning() -> None:
    tokens = ["one", "</thi", "nk>", "Two"]
    for prompt in ("<assistant><think>", "<assistant><think>\n"):
        assert await read(prompt, tokens) == (AnswerPart("Two", "one"), 3)
    assert await read("<think>hello<assistant>", tokens) == (AnswerPart("one</think>Two"), 0)
    assert await read("<assistant><think>\n\n</think>\n\n", ["Two"]) == (AnswerPart("Two"), 0)


async def test_without_markers_all_is_content() -> None:
    answer = Answer(AnswerFormat(), "<think>")
    assert await answer.add(["<think>", "x"], is_last=True) == AnswerPart("<think>x")
    assert answer.reasoning_count == 0
