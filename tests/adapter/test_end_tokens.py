"""Tokens that end a text, with a real model behind a real server."""

from __future__ import annotations

from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from support.harness import Server, joined, tokens

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

PROMPT = "def read_lines(path):"
GREEDY: dict[str, Any] = {"temperature": 0, "num_predict": 24}


async def test_a_stop_token_ends_its_row_alone(demo: Server) -> None:
    free = await demo.complete(PROMPT, **GREEDY)
    ids = tokens(free)
    stop = ids[9]
    at = ids.index(stop)
    calls = [
        demo.start(PROMPT, **GREEDY),
        demo.start(PROMPT, stop_token_ids=[stop], **GREEDY),
        demo.start(PROMPT, seed=3, num_predict=24),
    ]
    neighbour, stopped, _ = [[message async for message in call] for call in calls]
    assert tokens(neighbour) == ids
    assert tokens(stopped) == ids[: at + 1]
    assert stopped[-1].done_reason == pb.DONE_REASON_STOP
    shown = await demo.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids[:at]))
    assert joined(stopped) == shown.content


async def test_ignored_end_tokens_are_in_the_text(demo: Server) -> None:
    """A bias makes the end token the most likely one; its text is that of its token."""
    (end, *_) = (await demo.status()).model.eos_token_ids
    forced: dict[str, Any] = {"temperature": 0, "num_predict": 6, "logit_bias": {end: 100}}
    assert tokens(await demo.complete(PROMPT, **forced)) == [end]
    messages = await demo.complete(PROMPT, ignore_eos=True, logprobs=1, **forced)
    assert tokens(messages) == [end] * 6
    assert messages[-1].done_reason == pb.DONE_REASON_LENGTH
    shown = await demo.stub.Detokenize(pb.DetokenizeRequest(token_ids=[end] * 6))
    assert shown.content
    assert joined(messages) == shown.content
    entries = [entry for message in messages for entry in message.logprobs]
    assert "".join(entry.text for entry in entries) == shown.content


async def test_end_tokens_are_not_drawn_before_the_minimum(demo: Server) -> None:
    """A bias makes the end token the most likely one from the first token on."""
    ends = (await demo.status()).model.eos_token_ids
    bias = dict.fromkeys(ends, 100.0)
    never = tokens(await demo.complete(PROMPT, **GREEDY, logit_bias=dict.fromkeys(ends, -100.0)))
    options: dict[str, Any] = {**GREEDY, "logit_bias": bias, "logprobs": 2}
    counts = (0, 1, 5, 11, 24)
    calls = [demo.start(PROMPT, min_predict=count, **options) for count in counts]
    for count, call in zip(counts, calls, strict=True):
        messages = [message async for message in call]
        ids = tokens(messages)
        assert ids[:count] == never[:count]
        assert set(ids[count:]) <= set(ends)
        assert len(ids) == min(count + 1, 24)
        reason = pb.DONE_REASON_LENGTH if count == 24 else pb.DONE_REASON_STOP
        assert messages[-1].done_reason == reason
        # Log probabilities are those of the logits without bias and mask.
        entries = [entry for message in messages for entry in message.logprobs]
        assert all(-50 < entry.logprob <= 0 for entry in entries)


async def test_stop_tokens_are_not_drawn_before_the_minimum(demo: Server) -> None:
    half = list(range(0, 2048, 2))
    options: dict[str, Any] = {"seed": 4, "stop_token_ids": half, "num_predict": 40}
    ids = tokens(await demo.complete(PROMPT, min_predict=20, **options))
    assert len(ids) > 20
    assert not set(ids[:20]) & set(half)
    assert ids[-1] in half
