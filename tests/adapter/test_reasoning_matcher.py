"""The position of an answer in its reasoning, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.chat.format import CONTENT, REASONING, TOOL, AnswerFormat
from runner_server.chat.reasoning import Reasoning
from runner_server.engine.types import Constraint
from runner_server.errors import InvalidField
from runner_server.mlx_backend.constraints.grammars import GrammarCache
from runner_server.mlx_backend.constraints.reasoning import ReasoningMatcher
from runner_server.mlx_backend.tokenizer.codec import FastCodec
from support.tokenizer_files import byte_level

END_OF_TEXT = 3
MARKERS = AnswerFormat(
    {CONTENT: (("<think>", REASONING),), REASONING: (("</think>", CONTENT),)}, think_start="<think>"
)
WITH_TOOLS = AnswerFormat(
    {
        CONTENT: (("<think>", REASONING), ("[T]", TOOL)),
        REASONING: (("</think>", CONTENT), ("[T]", TOOL)),
        TOOL: (("[/T]", CONTENT),),
    },
    think_start="<think>",
)
YES = Constraint("choice", ("yes",))


@pytest.fixture
def codec() -> FastCodec:
    """A tokenizer with the marker after reasoning, and tokens that go on after it."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["</think>", ">yes", "x</think>y"])
    return FastCodec(tokenizer, [], None)


def start(
    codec: FastCodec,
    constraint: Constraint | None = YES,
    *,
    markers: AnswerFormat = MARKERS,
    is_open: bool = True,
    budget: int | None = None,
) -> ReasoningMatcher:
    """Return a matcher at the beginning of an answer."""
    cache = GrammarCache(codec, codec.vocab_size, [END_OF_TEXT])
    grammar = cache.compile(constraint).result() if constraint else None
    reasoned = cache.after_reasoning(Reasoning(markers, is_open, budget), grammar).result()
    matcher: Any = reasoned.start()
    return matcher  # type: ignore[no-any-return]


def ids_of(codec: FastCodec, text: str) -> list[int]:
    """Return the tokens of single characters, which spell a text."""
    return [id_ for char in text for id_ in codec.encode(char, as_prompt=False)]


def one(codec: FastCodec, text: str) -> int:
    """Return the one token of a text."""
    (id_,) = codec.encode(text, as_prompt=False)
    return id_


def allows(matcher: ReasoningMatcher, id_: int) -> bool:
    """Return whether a token is possible next, by the mask alone."""
    assert matcher.mask is not None
    return bool(matcher.mask[id_ // 32] >> id_ % 32 & 1)


def consume(matcher: ReasoningMatcher, ids: Sequence[int]) -> None:
    for id_ in ids:
        matcher.consume(id_)


def test_a_spelled_marker_ends_the_reasoning_exactly(codec: FastCodec) -> None:
    matcher = start(codec)
    crossing = one(codec, ">yes")
    assert allows(matcher, crossing), "it goes on after no marker here"
    assert not allows(matcher, one(codec, "x</think>y"))
    consume(matcher, ids_of(codec, "so</think"))
    assert not allows(matcher, crossing)
    assert allows(matcher, one(codec, ">"))
    consume(matcher, ids_of(codec, ">"))
    assert matcher.inner is not None
    assert not matcher.is_satisfied
    consume(matcher, codec.encode("yes", as_prompt=False))
    assert (matcher.is_satisfied, matcher.failure) == (True, "")


def test_the_end_of_the_text_is_excluded_from_reasoning_before_a_grammar(codec: FastCodec) -> None:
    assert not allows(start(codec), END_OF_TEXT)
    assert allows(start(codec, None), END_OF_TEXT)


@pytest.mark.parametrize("spelled", [False, True])
def test_the_marker_is_forced_when_the_budget_is_used_up(codec: FastCodec, spelled: bool) -> None:
    matcher = start(codec, budget=3)
    consume(matcher, ids_of(codec, "</t" if spelled else "abc"))
    end = one(codec, "</think>")
    assert [id_ for id_ in range(codec.vocab_size) if allows(matcher, id_)] == [end]
    matcher.consume(end)
    assert matcher.inner is not None


def test_a_call_ends_the_reasoning_and_its_budget(codec: FastCodec) -> None:
    matcher = start(codec, None, markers=WITH_TOOLS, budget=9)
    consume(matcher, ids_of(codec, "ab[T]<think>cdefg[/T]"))
    # Five tokens of reasoning are used up, and <think> within a call is none.
    consume(matcher, ids_of(codec, "x<think>123"))
    assert allows(matcher, one(codec, "x"))
    consume(matcher, ids_of(codec, "4"))
    end = one(codec, "</think>")
    assert [id_ for id_ in range(codec.vocab_size) if allows(matcher, id_)] == [end]
    assert matcher.is_satisfied is None
    assert matcher.accepts("x") is None


ANSWERS: list[tuple[bool, str, bool]] = [
    (True, "so</think>yes", True),
    (True, "yes", False),
    (True, "</think>yes", True),
    (True, "so</think>\nyes", False),
    (False, "yes", True),
    (False, "<think>so</think>yes", True),
    (False, "<think>yes", False),
    (False, " <think></think>yes", False),
]


@pytest.mark.parametrize(("is_open", "text", "expected"), ANSWERS)
def test_an_answer_is_judged_after_its_reasoning(
    codec: FastCodec, is_open: bool, text: str, expected: bool
) -> None:
    assert start(codec, is_open=is_open).accepts(text) is expected


def test_unfinished_reasoning_is_no_empty_answer(codec: FastCodec) -> None:
    matcher = start(codec, Constraint("regex", ("y*",)))
    assert not matcher.accepts("so")
    assert not matcher.is_satisfied
    matcher.consume(one(codec, "</think>"))
    assert matcher.accepts("so</think>")
    assert matcher.is_satisfied


def test_a_marker_that_the_tokenizer_cannot_write_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["</think>"])
    codec = FastCodec(tokenizer, [], None)
    cache = GrammarCache(codec, one(codec, "</think>"), [END_OF_TEXT])
    future = cache.after_reasoning(Reasoning(MARKERS, is_open=True, budget=1), None)
    with pytest.raises(InvalidField, match="'</think>'") as refused:
        future.result()
    assert [field for field, _ in refused.value.violations] == ["reasoning_budget"]
