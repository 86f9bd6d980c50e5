"""The order of work in a batch, on a simulated machine: prefill, decode steps, reuse, fairness."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner_server.engine.batch_planner import BatchPlanner
from runner_server.engine.prefill_policy import MAX_SECONDS, MIN_SECONDS
from runner_server.engine.prefill_queue import ChunkStart, companions
from runner_server.engine.prefix_cache import Match
from runner_server.engine.types import CachePolicy, Prefill
from runner_server.engine.work import DecodeItem, PrefillItem, PromptChunk
from support.planned_machine import LIMITS, PACE, Machine


def _prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(1, 1000), k=length)  # noqa: S311 - test data


def _prefills(machine: Machine) -> list[PrefillItem]:
    return [item for item in machine.items if isinstance(item, PrefillItem)]


# -- the life of a row -----------------------------------------------------------


def test_a_row_is_prefilled_except_for_its_last_token_and_joins_a_decode_step() -> None:
    machine = Machine()
    machine.add(7, _prompt(20, 0))
    machine.step()
    (prefill, decode) = machine.items
    assert prefill == PrefillItem((PromptChunk(7, restored=0, count=19, is_stored=True),))
    assert decode == DecodeItem(joining=(7,))
    machine.step()
    assert machine.items[2:] == [DecodeItem()]
    assert machine.progress[7] == Prefill(7, 19, 20)


def test_a_prompt_of_one_token_has_nothing_to_prefill() -> None:
    machine = Machine(keeps_prefixes=True)
    machine.add(0, [5])
    machine.step()
    assert machine.items[0] == PrefillItem((PromptChunk(0, 0, 0, is_stored=False),))
    assert machine.items[1] == DecodeItem(joining=(0,))
    assert not machine.stored


def test_without_rows_there_is_no_item() -> None:
    planner = BatchPlanner(LIMITS, lambda _ids, _salt: Match(0, 0))
    assert planner.next_item() is None
    planner.add(0, [1, 2], CachePolicy())
    planner.remove(0)
    assert planner.next_item() is None


def test_a_preempted_row_is_not_decoded_until_it_resumes() -> None:
    machine = Machine()
    for row in (0, 1):
        machine.add(row, _prompt(9, row))
    machine.step()
    machine.step()
    machine.planner.preempt(0)
    machine.planner.preempt(1)
    assert machine.planner.next_item() is None
    machine.planner.resume(1)
    assert machine.planner.next_item() == DecodeItem(joining=(1,))


def test_memory_is_expected_for_prompts_about_to_join() -> None:
    machine = Machine(call_seconds=1.0)
    machine.add(0, _prompt(30, 0))
    machine.add(1, _prompt(60, 1))
    machine.add(2, _prompt(600, 2))
    machine.step()
    assert machine.items[-1] == DecodeItem(joining=(0,), expected=1)


def test_the_first_row_that_is_ready_decodes_before_the_slice_is_over() -> None:
    machine = Machine()
    for row in range(4):
        machine.add(row, _prompt(60, row))
    while not machine.tokens[0]:
        machine.run_item()
    assert machine.clock < 2 * 60 / PACE
    assert not any(machine.tokens[row] for row in (1, 2, 3))


# -- reuse -----------------------------------------------------------------------


def test_a_cached_prefix_is_restored_and_counted() -> None:
    machine = Machine(keeps_prefixes=True)
    prompt = _prompt(50, 0)
    machine.add(0, prompt)
    machine.step()
    machine.add(1, [*prompt[:40], *_prompt(10, 1)])
    machine.step()
    assert _prefills(machine)[-1].chunks == (PromptChunk(1, 40, 9, is_stored=True),)
    assert machine.progress[1] == Prefill(1, 49, 50, cached=40)


def test_a_prompt_reuses_what_another_one_stores_meanwhile() -> None:
    machine = Machine(keeps_prefixes=True, call_seconds=0.5)
    prompt = _prompt(60, 0)
    machine.add(0, prompt)
    machine.add(1, prompt)
    while not (machine.tokens[0] and machine.tokens[1]):
        machine.step()
    chunks = [chunk for item in _prefills(machine) for chunk in item.chunks]
    # The first chunk is small, because the pace is not known yet.
    assert chunks == [
        PromptChunk(0, 0, 30, is_stored=True),
        PromptChunk(0, 0, 29, is_stored=True),
        PromptChunk(1, 59, 0, is_stored=False),
    ]


BYPASS = CachePolicy(reads=False, writes=False)


def test_a_prompt_that_bypasses_the_cache_takes_nothing_from_it_and_is_not_stored() -> None:
    machine = Machine(keeps_prefixes=True)
    prompt = _prompt(50, 0)
    machine.add(0, prompt)
    machine.step()
    stored = [*machine.stored]
    machine.add(1, prompt, BYPASS)
    machine.step()
    assert _prefills(machine)[-1].chunks == (PromptChunk(1, 0, 49, is_stored=False),)
    assert machine.progress[1] == Prefill(1, 49, 50, cached=0)
    assert machine.stored == stored


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        (CachePolicy(), CachePolicy(), False),
        (CachePolicy(), BYPASS, True),
        (BYPASS, CachePolicy(), True),
        (BYPASS, BYPASS, True),
        (CachePolicy(reads=False), CachePolicy(), False),
        (CachePolicy(salt="a"), CachePolicy(salt="a"), False),
        (CachePolicy(salt="a"), CachePolicy(salt="b"), True),
        (CachePolicy(salt="a"), CachePolicy(), True),
    ],
)
def test_equal_prompts_wait_for_each_other_only_if_they_share(
    first: CachePolicy, second: CachePolicy, *, together: bool
) -> None:
    one, other = (
        ChunkStart(row, 0, 0, 40, None, (5, 5), policy)
        for row, policy in enumerate((first, second))
    )
    expected = [other] if together else []
    assert companions(one, [other], most=9, shortest=20) == expected


def test_a_prompt_that_needs_logits_runs_alone_and_in_smaller_chunks() -> None:
    machine = Machine(replace(LIMITS, max_logits=24), call_seconds=0.02)
    for row in range(12):
        machine.add(row, _prompt(60, row), needs_logits=row % 4 == 1)
    while not all(machine.tokens.values()):
        machine.step()
    calls = [item.chunks for item in _prefills(machine)]
    with_logits = [chunks for chunks in calls if any(chunk.row % 4 == 1 for chunk in chunks)]
    assert all(len(chunks) == 1 and chunks[0].count <= 24 for chunks in with_logits)
    assert sum(chunks[0].count for chunks in with_logits) == 3 * 59
    # The others share calls as usual.
    assert max(map(len, calls)) >= 3


def test_a_chunk_stops_at_a_branch_where_a_snapshot_is_useful() -> None:
    machine = Machine(replace(LIMITS, needs_snapshot=True), keeps_prefixes=True)
    prompt = _prompt(120, 0)
    machine.add(0, prompt)
    machine.step()
    before = len(_prefills(machine))
    machine.add(1, [*prompt[:50], *_prompt(20, 1)])
    machine.step()
    machine.step()
    chunks = [chunk for item in _prefills(machine)[before:] for chunk in item.chunks]
    assert sum(chunk.count for chunk in chunks) == 69
    ends = [sum(chunk.count for chunk in chunks[: i + 1]) for i in range(len(chunks))]
    assert [end for end, chunk in zip(ends, chunks, strict=True) if chunk.is_stored] == [50, 69]


def test_an_evicted_prefix_is_prefilled_after_all() -> None:
    machine = Machine(keeps_prefixes=True)
    prompt = _prompt(50, 0)
    machine.add(0, prompt)
    machine.step()
    machine.add(1, prompt)
    machine.stored.clear()
    machine.step()
    assert machine.progress[1] == Prefill(1, 49, 50, cached=0)


# -- companions ------------------------------------------------------------------


def _start(row: int, left: int, *, position: int = 0, branch: int | None = None) -> ChunkStart:
    return ChunkStart(row, position, 0, position + left, branch, (row, row))


def test_companions_start_at_the_same_position_and_are_at_least_half_as_long() -> None:
    first = _start(0, 60)
    fitting = [_start(1, 60), _start(2, 30)]
    others = [
        _start(3, 29),
        _start(4, 61),
        _start(5, 50, position=16),
        _start(6, 50, branch=10),
        replace(_start(7, 50), lookahead=first.lookahead),
        replace(_start(8, 50), lookahead=fitting[0].lookahead),
    ]
    assert companions(first, [*fitting, *others], most=9, shortest=30) == fitting
    assert companions(first, [*fitting, *others], most=1, shortest=30) == fitting[:1]


def test_prompts_that_arrive_together_share_calls_once_the_pace_is_known() -> None:
    machine = Machine(call_seconds=0.02)
    for row in range(9):
        machine.add(row, _prompt(60, row))
    while not all(machine.tokens.values()):
        machine.step()
    sizes = [len(item.chunks) for item in _prefills(machine)]
    # The first prompt takes two calls, alone: the pace is not known yet.
    assert sizes[:2] == [1, 1]
    assert sum(sizes) == 10
    assert max(sizes) >= 3
    assert len(sizes) <= 6


def test_memory_limits_the_prompts_in_a_call() -> None:
    limits = replace(LIMITS, max_prompts=lambda length, before: 2 if length + before > 30 else 9)
    machine = Machine(limits, call_seconds=0.02)
    for row in range(9):
        machine.add(row, _prompt(60, row))
    while not all(machine.tokens.values()):
        machine.step()
    assert max(len(item.chunks) for item in _prefills(machine)) == 2


# -- fairness --------------------------------------------------------------------

STREAMS = 3
ARRIVALS = 6


@pytest.mark.parametrize("keeps_prefixes", [False, True], ids=["no cache", "cache"])
def test_no_stream_waits_long_while_long_prompts_keep_arriving(*, keeps_prefixes: bool) -> None:
    machine = Machine(keeps_prefixes=keeps_prefixes)
    for row in range(STREAMS):
        machine.add(row, _prompt(30, row))
    while any(machine.tokens[row] < 3 for row in range(STREAMS)):
        machine.step()
    arrived: dict[int, float] = {}
    first: dict[int, float] = {}
    gaps: list[float] = []
    last, made = machine.clock, [machine.tokens[row] for row in range(STREAMS)]
    while len(first) < ARRIVALS:
        if len(arrived) < ARRIVALS and machine.clock > len(arrived) * 0.6:
            row = 10 + len(arrived)
            machine.add(row, _prompt(4000, row))
            arrived[row] = machine.clock
        machine.step()
        counts = [machine.tokens[row] for row in range(STREAMS)]
        # Every stream gets a token in every step.
        assert counts == [count + 1 for count in made]
        gaps.append(machine.clock - last)
        last, made = machine.clock, counts
        for row in arrived.keys() - first.keys():
            if machine.tokens[row]:
                first[row] = machine.clock
                machine.remove(row)
    rows = STREAMS + ARRIVALS
    assert max(gaps) <= MIN_SECONDS + (16 + 2 * rows) / PACE
    # The long prompts overlap and finish in order, at more than half the pace.
    assert list(first) == sorted(first)
    assert max(first.values()) - arrived[10] < 2 * ARRIVALS * 4000 / PACE


@pytest.mark.parametrize("length", [120, 700])
def test_a_long_prompt_is_served_while_shorter_ones_keep_arriving(length: int) -> None:
    machine = Machine()
    machine.add(0, _prompt(30, 0))
    while not machine.tokens[0]:
        machine.step()
    machine.add(1, _prompt(4000, 1))
    began = machine.clock
    for newest in range(2, 10_000):
        machine.add(newest, _prompt(length, newest))
        while not machine.tokens[newest] and not machine.tokens[1]:
            machine.step()
        if machine.tokens[1]:
            break
        machine.remove(newest)
        # The long prompt gets half of the time; decoding takes a part of that.
        assert machine.clock - began < 4 * 4000 / PACE
    assert machine.tokens[1]


@pytest.mark.parametrize("length", [1, 20, 200])
def test_a_short_prompt_starts_while_long_ones_are_prefilled(length: int) -> None:
    machine = Machine()
    machine.add(0, _prompt(4000, 0))
    machine.add(1, _prompt(4000, 1))
    for _ in range(3):
        machine.step()
    began = machine.clock
    machine.add(2, _prompt(length, 2))
    while not machine.tokens[2]:
        machine.step()
    # Twice its own prefill, plus the slices in progress on arrival.
    assert machine.clock - began <= 2 * length / PACE + 2 * MAX_SECONDS


def test_a_cached_long_prompt_counts_as_short() -> None:
    machine = Machine(keeps_prefixes=True)
    cached = _prompt(3000, 0)
    machine.add(0, cached)
    while not machine.tokens[0]:
        machine.step()
    machine.remove(0)
    machine.add(1, _prompt(4000, 1))
    machine.step()
    began = machine.clock
    machine.add(2, [*cached[:2990], 5, 6, 7])
    while not machine.tokens[2]:
        machine.step()
    assert machine.clock - began <= 2 * MAX_SECONDS


# -- any order of events ---------------------------------------------------------

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "remove", "preempt", "resume", "run", "run", "run"]),
        st.integers(0, 200),
    ),
    max_size=60,
)


@given(events=EVENTS, keeps_prefixes=st.booleans(), needs_snapshot=st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_row_is_prefilled_once_and_decoded_until_it_leaves(
    *, events: list[tuple[str, int]], keeps_prefixes: bool, needs_snapshot: bool
) -> None:
    limits = replace(LIMITS, needs_snapshot=needs_snapshot)
    machine = Machine(limits, keeps_prefixes=keeps_prefixes)
    live: list[int] = []
    preempted: list[int] = []
    for at, (kind, number) in enumerate(events):
        if kind == "add":
            # Prompts of few families share beginnings.
            machine.add(at, [*_prompt(number, number % 3), *_prompt(1 + number % 40, number)])
            live.append(at)
        elif kind == "remove" and live:
            machine.remove(live.pop(number % len(live)))
        elif kind == "preempt" and (decoding := [row for row in live if machine.tokens[row]]):
            row = decoding[number % len(decoding)]
            machine.planner.remove(row)
            machine._decoding.discard(row)
            live.remove(row)
            preempted.append(row)
        elif kind == "resume" and preempted:
            row = preempted.pop(number % len(preempted))
            machine.planner.resume(row)
            live.append(row)
        elif kind == "run":
            _run_checked(machine, live)
    for _ in range(1000):
        if all(machine.tokens[row] for row in live):
            break
        machine.step()
    assert all(machine.tokens[row] for row in live)


def _run_checked(machine: Machine, live: Sequence[int]) -> None:
    """Run an item; only present rows may be in it, and no row joins twice."""
    before = set(machine._decoding)
    item = machine.run_item()
    if isinstance(item, PrefillItem):
        assert {chunk.row for chunk in item.chunks} <= set(live)
    elif isinstance(item, DecodeItem):
        assert set(item.joining) <= set(live) - before
        assert len(set(item.joining)) == len(item.joining)
