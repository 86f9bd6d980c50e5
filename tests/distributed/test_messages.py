"""The messages between ranks as lines, and the states in which a follower expects them."""

from __future__ import annotations

import json
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner_server.distributed import messages as msg
from runner_server.distributed.follower_state import TRANSITIONS, FollowerState, next_state
from runner_server.engine.types import CachePolicy, Dtype, LoadSpec, Sampling
from runner_server.engine.work import PromptChunk, TextChunk

FINITE = st.floats(allow_nan=False, allow_infinity=False)
SEEDS = st.integers(-(2**63), 2**64 - 1)
SAMPLINGS = st.builds(
    Sampling,
    temperature=FINITE,
    seed=SEEDS,
    logit_bias=st.lists(st.tuples(st.integers(0, 2**31), FINITE)).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
    min_predict=st.integers(0, 2**31 - 1),
    end_ids=st.lists(st.integers(0, 2**31)).map(tuple),
    logprob_token_ids=st.lists(st.integers(0, 2**31)).map(tuple),
    prompt_logprobs=st.none() | st.integers(0, 20),
)
POLICIES = st.builds(CachePolicy, st.booleans(), st.booleans(), st.text())
IDS = st.lists(st.integers(0, 2**31)).map(tuple)
MESSAGES = st.one_of(
    st.builds(msg.AddRow, st.integers(1, 2**40), IDS, SAMPLINGS, POLICIES),
    st.builds(
        msg.RunPrefill,
        st.lists(st.builds(PromptChunk, *[st.integers(0, 10**6)] * 3, st.booleans())).map(tuple),
    ),
    st.builds(msg.RunDecode, IDS, st.integers(0, 128)),
    st.builds(msg.AddTexts, st.integers(1, 2**40), st.lists(IDS).map(tuple)),
    st.builds(
        msg.RunEmbed,
        st.lists(st.builds(TextChunk, *[st.integers(0, 10**6)] * 3, st.booleans())).map(tuple),
    ),
    st.builds(
        msg.StartLoad,
        st.builds(LoadSpec, st.text(), dtype=st.sampled_from(Dtype), memory_override=st.booleans()),
    ),
    st.builds(msg.LoadFailed, st.text(), st.text(), st.dictionaries(st.text(), st.text())),
    st.builds(msg.LoadRead, FINITE),
)


@given(message=MESSAGES)
@settings(max_examples=200, deadline=None)
def test_a_message_survives_the_connection(message: msg.Message) -> None:
    line = msg.encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert msg.decode(line) == message


@pytest.mark.parametrize("kind", get_args(msg.Message), ids=lambda kind: kind.__name__)
def test_every_kind_has_a_name_of_its_own(kind: type[msg.Message]) -> None:
    with pytest.raises(ValueError, match="not a message"):
        msg.decode(json.dumps([kind.__name__, ["no", "fields"]]).encode())


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[]",
        b'["Unknown", {}]',
        b'["Trim"]',
        b'["Preempt", {"row": 1}]',
        b'["PreemptRow", {"row": "one"}]',
        b'["PreemptRow", {}]',
        b'["RunDecode", {"joining": [1.5], "expected": 0}]',
        b'["StartLoad", {"spec": {"model": "m", "dtype": "float8"}}]',
        b"\xff\n",
    ],
)
def test_a_line_that_is_not_a_message_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a message"):
        msg.decode(line)


def _path(*messages: msg.Message) -> FollowerState:
    state = FollowerState.IDLE
    for message in messages:
        state = next_state(state, message)
    return state


START = msg.StartLoad(LoadSpec("m"))
FAILED = msg.LoadFailed("ModelNotFound", "gone", {})


@pytest.mark.parametrize(
    ("messages", "state"),
    [
        ([START, msg.LoadRead(1.0), msg.FinishLoad(), msg.NewExecutor()], FollowerState.LOADED),
        ([START, msg.LoadRead(1.0), msg.AbortLoad(), START], FollowerState.READING),
        ([START, FAILED, msg.AbortLoad(), msg.Release(for_next=False)], FollowerState.IDLE),
        ([START, msg.AbortLoad(), FAILED, START], FollowerState.READING),
        ([msg.Release(for_next=True), START], FollowerState.READING),
    ],
)
def test_a_load_ends_in_every_order(messages: list[msg.Message], state: FollowerState) -> None:
    assert _path(*messages) is state


@pytest.mark.parametrize(
    "messages",
    [
        [msg.NewExecutor()],
        [msg.RunDecode((), 0)],
        [START, START],
        [START, msg.FinishLoad()],
        [START, msg.LoadRead(1.0), msg.LoadRead(1.0)],
        [START, FAILED, msg.FinishLoad()],
        [START, msg.LoadRead(1.0), msg.FinishLoad(), msg.AbortLoad()],
    ],
)
def test_a_message_that_does_not_belong_is_refused(messages: list[msg.Message]) -> None:
    with pytest.raises(RuntimeError, match="out of step"):
        _path(*messages)


def test_every_message_of_rank_0_belongs_to_a_state() -> None:
    known = {kind for _, kind in TRANSITIONS}
    assert set(get_args(msg.FromLeader)) - known == {msg.Beat}
    assert set(TRANSITIONS.values()) == set(FollowerState)
