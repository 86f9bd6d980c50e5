"""The arithmetic of a load's plan, on made-up sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner_server.engine.types import Dtype, LoadSpec
from runner_server.errors import InsufficientMemory, InvalidField
from runner_server.mlx_backend.model.differences import Difference, Exactness
from runner_server.mlx_backend.planning.plan import Plan, context_in_force, formats, make_plan
from runner_server.mlx_backend.planning.sizes import CacheShape, ModelSizes, Probe
from runner_server.mlx_backend.planning.tokenizer_memory import TokenizerMemory

MIB = 1 << 20
WEIGHTS = 64 * MIB
LAYER = CacheShape(token_bytes=1000)
ROW = 10 * 100 * 1000
"""Caches of ten layers for 100 tokens."""

SIZES = ModelSizes(
    device="cpu",
    context_length=100,
    probe=Probe(512, (LAYER,) * 10),
    weight_bytes=WEIGHTS,
    chunk=20,
    chunks_together=4,
    prefill_bytes=20 * MIB,
    together_bytes=40 * MIB,
    logits_bytes=MIB // 4,
    decode_bytes=lambda rows: rows * MIB,
    mask_bytes=0,
    load_transient_bytes=0,
    tokenizer=TokenizerMemory(0, 0),
    process_bytes=100,
)
"""A model whose working memory is that of prefill, whatever the number of sequences."""

STEPS = replace(SIZES, decode_bytes=lambda rows: rows * 50 * MIB)
"""A model whose working memory is that of a decode step, and grows with each sequence."""


def planned(sizes: ModelSizes = SIZES, **spec: Any) -> Plan:
    return make_plan(LoadSpec("m", **{"parallel": 8, "dtype": Dtype.FLOAT32, **spec}), sizes, 1000)


def least_bytes(sizes: ModelSizes = SIZES, **spec: Any) -> int:
    """Return the smallest limit for any sequence, as the error names it."""
    with pytest.raises(InsufficientMemory) as caught:
        planned(sizes, memory_limit_bytes=1, **spec)
    return int(caught.value.metadata["requiredBytes"])


def test_without_a_limit_there_is_room_for_every_sequence() -> None:
    plan = planned()
    arrays = int(1.15 * 40 * MIB) + 2 * MIB + 10 * 1000
    assert plan.buffer_cache_bytes == 32 * MIB
    assert plan.need.working_bytes == arrays + 32 * MIB
    assert (plan.need.weight_bytes, plan.need.process_bytes) == (WEIGHTS, 100)
    assert plan.kv_budget_bytes == plan.need.kv_bytes == 8 * ROW
    assert plan.need.prefix_cache_bytes == 2 * ROW
    assert plan.limit_bytes == WEIGHTS + 10 * ROW + plan.need.working_bytes
    assert (plan.context_length, plan.max_context_length, plan.parallel) == (100, 1000, 8)
    assert plan.dtype is Dtype.FLOAT32


@pytest.mark.parametrize(("given", "expected"), [(None, 2 * ROW + 20 * 10_000), (7, 7)])
def test_tokens_in_transit_to_disk_are_part_of_the_default_prefix_cache(
    given: int | None, expected: int
) -> None:
    spec = LoadSpec("m", parallel=8, dtype=Dtype.FLOAT32, prefix_cache_bytes=given)
    plan = make_plan(spec, SIZES, 1000, transit_tokens=20)
    assert plan.need.prefix_cache_bytes == expected


@pytest.mark.parametrize("sizes", [SIZES, STEPS], ids=["prefill", "steps"])
@pytest.mark.parametrize("prefix", [None, 0, 5 * MIB])
def test_a_limit_for_one_sequence_is_enough_to_the_byte(
    sizes: ModelSizes, prefix: int | None
) -> None:
    least = least_bytes(sizes, prefix_cache_bytes=prefix)
    plan = planned(sizes, memory_limit_bytes=least, prefix_cache_bytes=prefix)
    assert (plan.limit_bytes, plan.kv_budget_bytes, plan.share) == (least, ROW, 1)
    assert plan.need.prefix_cache_bytes == (prefix or 0)
    assert plan.parallel == 1
    assert plan.need.working_bytes == planned(sizes, parallel=1).need.working_bytes
    with pytest.raises(InsufficientMemory) as caught:
        planned(sizes, memory_limit_bytes=least - 1, prefix_cache_bytes=prefix)
    assert caught.value.metadata == {
        "requiredBytes": str(least),
        "availableBytes": str(least - 1),
    }


def test_a_limit_that_is_too_small_is_refused_part_by_part() -> None:
    parts = r"64\.0 MiB weights, 976\.6 KiB KV cache for 100 tokens, .* MiB working memory\)"
    with pytest.raises(InsufficientMemory, match=parts):
        planned(memory_limit_bytes=1)
    with pytest.raises(InsufficientMemory, match=r"working memory, 5\.0 MiB prefix cache\) and"):
        planned(memory_limit_bytes=1, prefix_cache_bytes=5 * MIB)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8])
def test_a_limit_reduces_the_sequences_within_the_kv_budget(rows: int) -> None:
    limit = planned(prefix_cache_bytes=0).limit_bytes - (8 - rows) * ROW
    plan = planned(memory_limit_bytes=limit)
    assert (plan.share, plan.limit_bytes, plan.parallel) == (rows, limit, 8)
    if rows > 1:
        short = planned(memory_limit_bytes=limit - 1)
        assert (short.kv_budget_bytes, short.limit_bytes) == (rows * ROW - 1, limit - 1)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8])
def test_a_limit_reduces_the_working_memory_to_the_sequences_that_fit(rows: int) -> None:
    free = planned(STEPS, parallel=rows, prefix_cache_bytes=0)
    plan = planned(STEPS, memory_limit_bytes=free.limit_bytes, prefix_cache_bytes=0)
    assert plan.need.working_bytes == free.need.working_bytes
    assert plan.limit_bytes == free.limit_bytes
    if rows > 1:
        fewer = planned(STEPS, parallel=rows - 1, prefix_cache_bytes=0)
        plan = planned(STEPS, memory_limit_bytes=free.limit_bytes - ROW - 1, prefix_cache_bytes=0)
        assert plan.need.working_bytes == fewer.need.working_bytes
        assert (plan.share, plan.parallel) == (rows - 1, rows - 1)


def test_short_sequences_decode_together_if_their_step_fits_beside_the_full_ones() -> None:
    """A step takes much memory for each sequence, however short."""
    three = planned(STEPS, parallel=3, prefix_cache_bytes=0)
    five = planned(STEPS, parallel=5, prefix_cache_bytes=0)
    step = five.need.working_bytes - three.need.working_bytes
    long = replace(STEPS, context_length=STEPS.context_length * 100)
    for spare, parallel in ((0, 3), (step - 1, 4), (step, 5)):
        limit = planned(long, parallel=3, prefix_cache_bytes=0).limit_bytes + spare
        plan = planned(long, memory_limit_bytes=limit, prefix_cache_bytes=0)
        assert (int(plan.share), plan.parallel) == (3, parallel)


def test_sequences_that_the_kv_budget_cannot_hold_take_no_working_memory() -> None:
    """The smallest cache is that of a whole state, so short sequences take as much as long ones."""
    state = replace(STEPS, probe=Probe(512, (CacheShape(fixed_bytes=ROW // 10),) * 10))
    limit = planned(state, parallel=3, prefix_cache_bytes=0).limit_bytes
    plan = planned(state, memory_limit_bytes=limit + ROW // 2)
    assert (plan.parallel, plan.kv_budget_bytes) == (3, 3 * ROW)
    assert plan.need.prefix_cache_bytes == ROW // 2


def test_a_preempted_sequence_is_copied_within_the_limit() -> None:
    """Two sequences of half the length fit the caches of one, and one of them may be copied."""
    sizes = replace(SIZES, context_length=10_000, prefill_bytes=40 * MIB)
    one = planned(sizes, parallel=1, prefix_cache_bytes=0)
    copied = int(1.15 * (100 * ROW // 2)) - int(1.15 * 40 * MIB)
    for spare, parallel in ((copied - 1, 1), (copied, 8)):
        limit = one.limit_bytes + spare
        plan = planned(sizes, memory_limit_bytes=limit, prefix_cache_bytes=0)
        assert (int(plan.share), plan.parallel) == (1, parallel)


@given(
    step=st.sampled_from([0, MIB // 8, MIB, 50 * MIB]),
    layers=st.sampled_from([1, 10]),
    tokens=st.sampled_from([1, 100, 20_000]),
    parallel=st.integers(1, 40),
    spare=st.integers(0, 2_000 * MIB),
    prefix=st.sampled_from([None, 0, 7 * MIB]),
)
def test_no_plan_promises_more_than_its_limit(
    step: int, layers: int, tokens: int, parallel: int, spare: int, prefix: int | None
) -> None:
    sizes = replace(
        SIZES,
        context_length=tokens,
        probe=Probe(512, (LAYER,) * layers),
        decode_bytes=lambda rows: rows * step,
    )
    row = sizes.row_bytes
    spec: dict[str, Any] = {"parallel": parallel, "prefix_cache_bytes": prefix}
    limit = least_bytes(sizes, **spec) + spare
    plan = planned(sizes, **spec, memory_limit_bytes=limit)
    assert plan.limit_bytes <= limit
    # As many full sequences as the budget can hold, and as many of any length as decode together.
    full = min(plan.parallel, int(plan.share))
    assert planned(sizes, parallel=full, prefix_cache_bytes=prefix or 0).limit_bytes <= limit
    arrays = plan.need.working_bytes - plan.buffer_cache_bytes
    assert arrays >= 1.15 * step * plan.parallel
    if plan.parallel > 1:
        assert arrays >= 1.15 * min(row, plan.kv_budget_bytes // 2)
    # One more full sequence would not fit.
    if full < parallel:
        more = planned(sizes, parallel=full + 1, prefix_cache_bytes=prefix or 0)
        assert more.limit_bytes > limit
    # A client loads with the estimated number.
    again = planned(sizes, **{**spec, "parallel": plan.parallel}, memory_limit_bytes=limit)
    assert again == plan


@pytest.mark.parametrize(("parallel", "rows"), [(1, 1), (4, 1), (8, 2), (32, 8)])
def test_the_default_prefix_cache_is_a_sequence_or_a_quarter_of_all(
    parallel: int, rows: int
) -> None:
    assert planned(parallel=parallel).need.prefix_cache_bytes == rows * ROW


@pytest.mark.parametrize(
    ("spare", "kept"), [(0, 0), (1, 1), (2 * ROW, 2 * ROW), (9 * ROW, 2 * ROW)]
)
def test_the_default_prefix_cache_takes_what_the_limit_leaves(spare: int, kept: int) -> None:
    full = planned(prefix_cache_bytes=0).limit_bytes
    plan = planned(memory_limit_bytes=full + spare)
    assert (plan.need.prefix_cache_bytes, plan.share) == (kept, 8)


@pytest.mark.parametrize(
    ("granted", "kept"), [(-1, 0), (0, 0), (1, 1), (2 * ROW, 2 * ROW), (9 * ROW, 2 * ROW)]
)
def test_the_default_prefix_cache_fits_the_granted_memory(granted: int, kept: int) -> None:
    plan = planned()
    within = plan.within(plan.need.required_bytes + granted)
    assert within == replace(plan, need=replace(plan.need, prefix_cache_bytes=kept))
    requested = planned(prefix_cache_bytes=2 * ROW)
    assert requested.within(requested.need.required_bytes + granted) == requested


def test_prompts_are_prefilled_together_in_a_bounded_part_of_the_memory() -> None:
    most = 64 * MIB + WEIGHTS // 32
    small, large, larger = (
        planned(replace(SIZES, together_bytes=size), prefix_cache_bytes=0)
        for size in (most - 100, most, 2 * most)
    )
    assert small.need.working_bytes < large.need.working_bytes == larger.need.working_bytes
    # A single sequence has nothing to be prefilled with.
    alone = planned(replace(SIZES, together_bytes=2 * most), parallel=1)
    assert alone.need.working_bytes == int(1.15 * 20 * MIB) + 2 * MIB + 10_000 + (
        alone.buffer_cache_bytes
    )


@pytest.mark.parametrize(
    ("device", "step", "kept"),
    [("cpu", 0, 4 * MIB), ("cpu", 99 * MIB, 32 * MIB), ("gpu", 0, 64 * MIB)],
)
def test_kept_buffers_have_a_minimum_and_a_maximum(device: str, step: int, kept: int) -> None:
    sizes = replace(
        SIZES, device=device, prefill_bytes=0, together_bytes=0, decode_bytes=lambda _: step
    )
    assert planned(sizes).buffer_cache_bytes == kept


@pytest.mark.parametrize(("parallel", "copied"), [(1, ROW // 10), (2, ROW), (20, 20 * ROW // 10)])
def test_a_layer_of_all_sequences_or_a_whole_sequence_is_copied(parallel: int, copied: int) -> None:
    sizes = replace(SIZES, prefill_bytes=0, together_bytes=0, decode_bytes=lambda _: 0)
    plan = planned(sizes, parallel=parallel)
    arrays = plan.need.working_bytes - plan.buffer_cache_bytes
    assert arrays == int(1.15 * copied) + 2 * MIB + 10 * 1000


def test_the_last_chunk_of_a_full_prompt_takes_the_measured_memory() -> None:
    plan = planned()
    assert plan.chunk_bytes(20, 80) == pytest.approx(20 * MIB)
    assert plan.token_bytes == 40 * MIB / 80


def test_reading_counts_only_beyond_the_memory_that_is_taken_later() -> None:
    plan = planned()
    later = plan.limit_bytes - WEIGHTS
    for more in (0, 1):
        weights = replace(SIZES, load_transient_bytes=later + more)
        assert planned(weights).need.load_transient_bytes == more
        tokenizer = TokenizerMemory(7, 7 + plan.limit_bytes + more)
        need = planned(replace(SIZES, tokenizer=tokenizer)).need
        assert (need.load_transient_bytes, need.process_bytes) == (more, 107)


def test_a_load_takes_the_smallest_share_of_any_rank() -> None:
    plan = planned(parallel=3)
    assert plan.share == 3
    assert plan.with_share(1.5) == replace(plan, kv_budget_bytes=ROW * 3 // 2)
    assert plan.with_share(99.0) == plan


def test_a_settled_load_leaves_no_choice() -> None:
    asked = LoadSpec("m", parallel=8, memory_limit_bytes=5)
    assert planned().settled(asked) == LoadSpec("m", 100, 8, Dtype.FLOAT32, 5, 2 * ROW)


@pytest.mark.parametrize(
    ("asked", "device", "tried"),
    [
        (Dtype.AUTO, "cpu", (Dtype.FLOAT32,)),
        (Dtype.AUTO, "gpu", (Dtype.AS_STORED,)),
        (Dtype.AUTO_OR_STORED, "cpu", (Dtype.FLOAT32, Dtype.AS_STORED)),
        (Dtype.AUTO_OR_STORED, "gpu", (Dtype.AS_STORED,)),
        (Dtype.FLOAT16, "cpu", (Dtype.FLOAT16,)),
    ],
)
def test_formats_to_try(asked: Dtype, device: str, tried: tuple[Dtype, ...]) -> None:
    assert formats(asked, device) == tried


EXACT = Exactness()
INEXACT = Exactness((Difference("no window", 128), Difference("no factor", 64)))
ALWAYS = Exactness((Difference("no softcap"),))


@pytest.mark.parametrize(
    ("longest", "exactness", "context"),
    [(100, EXACT, 100), (10_000, EXACT, 4096), (10_000, INEXACT, 64), (50, INEXACT, 50)],
)
def test_the_default_context_is_exact(longest: int, exactness: Exactness, context: int) -> None:
    assert context_in_force(LoadSpec("m"), longest, exactness) == context


def test_a_context_beyond_the_models_is_refused() -> None:
    assert context_in_force(LoadSpec("m", 8192), 8192, EXACT) == 8192
    with pytest.raises(InvalidField, match="8193 is more than the 8192 tokens this model can"):
        context_in_force(LoadSpec("m", 8193, allow_inexact=True), 8192, EXACT)


def test_a_context_beyond_the_exact_length_needs_allow_inexact() -> None:
    assert context_in_force(LoadSpec("m", 64), 1000, INEXACT) == 64
    with pytest.raises(InvalidField, match=r"65 .* the 64 tokens .*\(no window; no factor\)"):
        context_in_force(LoadSpec("m", 65), 1000, INEXACT)
    assert context_in_force(LoadSpec("m", 65, allow_inexact=True), 1000, INEXACT) == 65


def test_a_difference_in_every_sequence_does_not_shorten_the_context() -> None:
    assert context_in_force(LoadSpec("m", 1000), 1000, ALWAYS) == 1000


@pytest.mark.parametrize(
    ("logits_bytes", "most"),
    [
        # All of the arrays are for 48 MiB: 1 MiB for each token of the last chunk, and its logits.
        (0, 41),
        (MIB, 20),
        (10 * MIB, 3),
        (1000 * MIB, 1),
    ],
)
def test_chunks_with_log_probabilities_fit_the_working_memory(logits_bytes: int, most: int) -> None:
    plan = planned(replace(SIZES, logits_bytes=logits_bytes))
    assert plan.max_logits == most
    assert plan.need == planned().need
