"""Texts to embed beside prompts and decode steps, on a simulated machine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner_server.engine.embedding.request import AnyRequest, EmbeddingRequest
from runner_server.engine.embedding.types import Embedded, EmbedSpec
from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.prefill_policy import MAX_SECONDS, MIN_SECONDS
from runner_server.engine.request import RequestStatus
from runner_server.engine.scheduler import SECONDS_PER_LEVEL, Scheduler
from runner_server.engine.types import CompletionSpec, Prefill, Token
from runner_server.engine.work import DecodeItem, EmbedItem, TextChunk
from support.fakes import TOKEN_BYTES, ByteCodec, FakeBackend, FakeModel, model_info
from support.planned_machine import LIMITS, PACE, Machine


def _embeds(machine: Machine) -> list[EmbedItem]:
    return [item for item in machine.items if isinstance(item, EmbedItem)]


def _run_until_embedded(machine: Machine, **counts: int) -> None:
    for _ in range(5000):
        if all(len(texts) == counts[f"row{row}"] for row, texts in machine.embedded.items()):
            return
        machine.run_item()
    raise AssertionError("the texts are not embedded")


# -- the order of texts ----------------------------------------------------------


def test_a_long_text_runs_in_chunks_and_short_ones_together() -> None:
    machine = Machine()
    machine.add_texts(1, [10, 150, 12, 11])
    _run_until_embedded(machine, row1=4)
    chunks = [item.chunks for item in _embeds(machine)]
    long = [chunk for (chunk, *rest) in chunks if not rest and chunk.text == 1]
    assert sum(chunk.count for chunk in long) == 150
    assert chunks[-1] == tuple(
        TextChunk(1, text, count, is_last=True) for text, count in ((2, 12), (3, 11), (0, 10))
    )
    assert machine.planner.next_item() is None


def test_texts_of_several_requests_share_a_call() -> None:
    machine = Machine(call_seconds=0.01)
    machine.add_texts(1, [64] * 2)
    _run_until_embedded(machine, row1=2)
    for row in (2, 3, 4):
        machine.add_texts(row, [20])
    machine.run_item()
    assert {chunk.row for chunk in _embeds(machine)[-1].chunks} == {2, 3, 4}


def test_a_text_of_half_the_length_is_not_padded() -> None:
    machine = Machine()
    machine.add_texts(1, [40, 20, 19])
    _run_until_embedded(machine, row1=3)
    calls = [[chunk.count for chunk in item.chunks] for item in _embeds(machine)]
    assert not [call for call in calls if min(call) * 2 < max(call)]
    assert [40, 20] in calls or [40] in calls


@pytest.mark.parametrize("most", [1, 2])
def test_no_more_texts_share_a_call_than_the_model_and_memory_allow(most: int) -> None:
    machine = Machine(replace(LIMITS, max_texts=lambda _length: most))
    machine.add_texts(1, [20] * 6)
    _run_until_embedded(machine, row1=6)
    assert max(len(item.chunks) for item in _embeds(machine)) == most


def test_the_progress_of_a_text_in_part_is_reported() -> None:
    machine = Machine()
    machine.add_texts(1, [200])
    machine.run_item()
    first = _embeds(machine)[0].chunks[0]
    assert machine.progress[1] == Prefill(1, first.count, 200)


# -- beside streams --------------------------------------------------------------


def test_streams_get_a_step_after_every_slice() -> None:
    """Embed 200 texts beside 8 streams, whose steps never wait for more than the longest slice."""
    machine = Machine()
    for row in range(8):
        machine.add(row, [1] * 20)
    while not all(machine.tokens[row] for row in range(8)):
        machine.step()
    machine.add_texts(100, [50] * 200)
    begin, steps, longest, last = machine.clock, 0, 0.0, machine.clock
    while len(machine.embedded[100]) < 200:
        if isinstance(machine.run_item(), DecodeItem):
            longest, last, steps = max(longest, machine.clock - last), machine.clock, steps + 1
    # One request counts like one prompt, however many texts it has.
    assert longest < 2 * MIN_SECONDS
    assert longest < MAX_SECONDS
    assert steps > (machine.clock - begin) / (2 * MIN_SECONDS)
    assert (machine.clock - begin) < 2.5 * 200 * 50 / PACE


def test_a_prompt_does_not_wait_for_all_texts_and_they_do_not_wait_for_all_prompts() -> None:
    machine = Machine()
    machine.add_texts(100, [60] * 100)
    machine.run_item()
    machine.add(0, [1] * 40)
    while not machine.tokens[0]:
        machine.run_item()
    assert len(machine.embedded[100]) < 40
    for row in range(1, 200):
        machine.add(row, [1] * 40)
        for _ in range(8):
            machine.run_item()
        if machine.tokens[row]:
            machine.remove(row)
        if len(machine.embedded[100]) == 100:
            return
    raise AssertionError("new prompts postpone the texts indefinitely")


@settings(deadline=None, max_examples=80)
@given(seed=st.integers(0, 2**32))
def test_any_mixture_embeds_every_text_once(seed: int) -> None:
    """The simulated machine checks that each request has at most one text in part."""
    generator = random.Random(seed)  # noqa: S311 - test data
    machine = Machine(keeps_prefixes=generator.random() < 0.5)
    lengths: dict[int, list[int]] = {}
    for row in range(generator.randrange(1, 8)):
        if generator.random() < 0.6:
            lengths[row] = [generator.randrange(1, 200) for _ in range(generator.randrange(1, 30))]
            machine.add_texts(row, lengths[row])
        else:
            machine.add(row, [generator.randrange(9) for _ in range(generator.randrange(1, 200))])
        for _ in range(generator.randrange(4)):
            machine.run_item()
        if lengths and generator.random() < 0.1:
            gone = generator.choice([*lengths])
            machine.remove(gone)
            del lengths[gone]
    for _ in range(3000):
        if all(len(machine.embedded[row]) == len(own) for row, own in lengths.items()):
            break
        machine.run_item()
    for row, own in lengths.items():
        assert sorted(machine.embedded[row]) == [*range(len(own))]


# -- admission -------------------------------------------------------------------


def _model(*, parallel: int = 2, budget_tokens: int = 10**6) -> FakeModel:
    info = replace(model_info(), parallel=parallel, kv_budget_bytes=budget_tokens * TOKEN_BYTES)
    return FakeModel(FakeBackend(), info)


def _generation(length: int = 10) -> GenerationRequest:
    return GenerationRequest(CompletionSpec((1,), length - 1), ByteCodec(), frozenset())


def _texts(*lengths: int, priority: int = 0) -> EmbeddingRequest:
    texts = tuple((1,) * length for length in lengths or (10,))
    return EmbeddingRequest(EmbedSpec(texts, priority=priority))


def _scheduler(model: FakeModel, requests: Sequence[AnyRequest]) -> Scheduler:
    scheduler = Scheduler()
    scheduler.start_batch(model, model.new_executor())
    for request in requests:
        scheduler.add(request)
    return scheduler


def test_texts_overtake_requests_that_lack_a_slot_and_take_none() -> None:
    model = _model(parallel=1)
    first, second, texts = _generation(), _generation(), _texts()
    scheduler = _scheduler(model, [first, second, texts])
    assert scheduler.admit(model) == [first, texts]
    assert scheduler.remove(texts)
    assert not scheduler.has_next(model)
    assert scheduler.remove(first)
    assert scheduler.admit(model) == [second]


def test_as_many_requests_to_embed_as_slots_are_admitted() -> None:
    model = _model(parallel=2)
    requests = [_texts() for _ in range(3)]
    scheduler = _scheduler(model, requests)
    assert scheduler.admit(model) == requests[:2]
    assert scheduler.has_running
    scheduler.remove(requests[0])
    assert scheduler.admit(model) == [requests[2]]


def test_the_longest_text_counts_beside_the_rows() -> None:
    """Rows of 30 tokens take 60 of 100; a text of 40 fits, one of 41 does not."""
    for longest, fits in ((40, True), (41, False)):
        model = _model(parallel=2, budget_tokens=100)
        scheduler = _scheduler(model, [_generation(30), _generation(20), _texts(5, longest, 7)])
        assert (len(scheduler.admit(model)) == 3) is fits


def test_nothing_overtakes_texts_that_lack_memory() -> None:
    model = _model(parallel=4, budget_tokens=100)
    first, large, small = _generation(50), _texts(60), _generation(10)
    scheduler = _scheduler(model, [first, large, small])
    assert scheduler.admit(model) == [first]
    scheduler.remove(first)
    assert scheduler.admit(model) == [large, small]


def test_texts_that_lack_memory_do_not_block_a_preempted_request() -> None:
    model = _model(parallel=4, budget_tokens=100)
    slow = _generation(60)
    scheduler = _scheduler(model, [slow])
    scheduler.admit(model)
    for _ in range(40):
        slow.on_token(Token(slow.id, 97))
    scheduler.preempt(slow)
    large = _texts(90, priority=100)
    scheduler.add(large)
    assert scheduler.admit(model) == []
    scheduler.mark_resumable(slow.id)
    scheduler.admit(model)
    assert slow.status is RequestStatus.DECODING


def test_priority_counts_among_requests_of_both_kinds() -> None:
    model = _model(parallel=1, budget_tokens=10)
    early, late = _generation(10), _texts(10, priority=5)
    late.submitted_at = early.submitted_at + 4 * SECONDS_PER_LEVEL
    scheduler = _scheduler(model, [early, late])
    assert scheduler.admit(model) == [late]


# -- a request -------------------------------------------------------------------


def test_a_request_counts_its_texts_and_holds_one_at_a_time() -> None:
    from array import array

    request = _texts(3, 300)
    assert request.max_length == 300
    assert request.stats().prompt_seconds is None
    request.admit()
    request.on_prefill(Prefill(request.id, 128, 300))
    assert request.kv_token_count == 128
    assert not request.on_vector(Embedded(request.id, 1, array("f", [1.0])))
    assert request.kv_token_count == 0
    assert request.on_vector(Embedded(request.id, 0, array("f", [2.0])))
    assert request.status is RequestStatus.FINISHED
    stats = request.stats()
    assert (stats.prompt_count, stats.eval_count, stats.reason) == (303, 0, None)
    with pytest.raises(RuntimeError, match="finished"):
        request.cancel()
