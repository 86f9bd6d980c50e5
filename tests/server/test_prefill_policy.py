"""Division of the time between decode steps among prompts, on machines of known pace."""

from __future__ import annotations

import pytest

from runner_server.engine.prefill_policy import MAX_SECONDS, MIN_CHUNK, MIN_SECONDS, PrefillPolicy

DECODE_SECONDS = 0.005
MAX_CHUNK = 128


class Machine:
    """Prefill at ``pace`` tokens a second, driven as the batch drives the policy.

    Attributes:
        remaining: Tokens left of each prompt, in order of arrival.
        seconds: Duration of the last slice.
        chunks: Chunks of the last slice: prompt and tokens.
    """

    def __init__(self, pace: float, max_chunk: int = MAX_CHUNK) -> None:
        self.pace = pace
        self.policy = PrefillPolicy(max_chunk)
        self.remaining: dict[int, int] = {}
        self.seconds = 0.0
        self.chunks: list[tuple[int, int]] = []

    def slice(self, decode_seconds: float = DECODE_SECONDS, decoding: int = 4) -> None:
        """Run the prefill between two decode steps."""
        self.policy.begin_slice(decode_seconds, decoding, len(self.remaining))
        self.seconds, self.chunks = 0.0, []
        while chunk := self.policy.next(self.remaining):
            row, count = chunk
            assert 0 <= count <= self.remaining[row]
            self.chunks.append(chunk)
            self.remaining[row] -= count
            if count:
                self.seconds += count / self.pace
                self.policy.record(count, count / self.pace)
            if not self.remaining[row]:
                del self.remaining[row]

    def warm(self) -> None:
        """Let the policy measure the pace."""
        self.remaining[-1] = 2000
        while self.remaining:
            self.slice()


@pytest.mark.parametrize("pace", [100, 1000, 5000, 30_000, 500_000])
def test_running_streams_wait_no_longer_than_a_slice(pace: float) -> None:
    machine = Machine(pace)
    machine.warm()
    machine.remaining = {0: 4000, 1: 300, 2: 1500}
    slices = 0
    while machine.remaining:
        machine.slice()
        slices += 1
        # No machine can do less than the smallest chunk, and the last chunk of a prompt may be half
        # as long again.
        assert machine.seconds <= 1.5 * max(MIN_SECONDS, MIN_CHUNK / pace)
    # The time is used: at most half of each slice remains.
    assert slices <= 2 * 5800 / max(pace * MIN_SECONDS, MIN_CHUNK) + 4


def test_a_slower_machine_gets_smaller_chunks() -> None:
    machine = Machine(30_000)
    machine.warm()
    machine.pace = 3000
    machine.remaining = {0: 100_000}
    for _ in range(20):
        machine.slice()
    assert machine.seconds <= MIN_SECONDS * 1.05


@pytest.mark.parametrize("pace", [100, 3000, 500_000])
def test_the_very_first_chunk_is_small(pace: float) -> None:
    machine = Machine(pace)
    machine.remaining = {0: 4000}
    machine.slice()
    assert machine.chunks[0] == (0, MIN_CHUNK)


@pytest.mark.parametrize("max_chunk", [64, 128, 1024])
def test_no_chunk_exceeds_the_maximum(max_chunk: int) -> None:
    machine = Machine(500_000, max_chunk)
    machine.remaining = {0: 10_000, 1: 5000}
    while machine.remaining:
        machine.slice()
        assert max(count for _, count in machine.chunks) <= max_chunk


@pytest.mark.parametrize("max_chunk", [128, 1024])
def test_a_lone_prompt_gets_whole_chunks(max_chunk: int) -> None:
    """Without decoding only a newcomer or a cancel waits for the chunk."""
    machine = Machine(20_000, max_chunk)
    machine.warm()
    machine.remaining = {0: 10_000}
    counts: list[int] = []
    slices = 0
    while machine.remaining:
        machine.slice(decoding=0)
        slices += 1
        counts += [count for _, count in machine.chunks]
        assert machine.seconds <= MAX_SECONDS * 1.1
    assert slices <= 3
    whole = sum(count == max_chunk for count in counts)
    # Except the last two chunks of a prompt and the rest of a slice.
    assert whole >= len(counts) - 2 * slices - 2


def test_a_slow_decode_step_gives_prefill_twice_its_time() -> None:
    machine = Machine(5000)
    machine.warm()
    machine.remaining = {0: 10_000}
    machine.slice(decode_seconds=0.5, decoding=1)
    assert 0.9 <= machine.seconds <= 1.0


@pytest.mark.parametrize("pace", [300, 1000, 3000, 10_000, 100_000])
@pytest.mark.parametrize("max_chunk", [128, 1024])
@pytest.mark.parametrize("length", [100, 500, 1500])
def test_short_prompts_do_not_starve_a_long_one(pace: float, max_chunk: int, length: int) -> None:
    """Give a long prompt half of the time, however many shorter ones arrive later."""
    machine = Machine(pace, max_chunk)
    machine.warm()
    machine.remaining = {0: 4000}
    newest = 0
    total = slices = 0.0
    while 0 in machine.remaining:
        if len(machine.remaining) < 2:
            newest += 1
            machine.remaining[newest] = length
        machine.slice()
        total += machine.seconds
        slices += 1
        share = (4000 - machine.remaining.get(0, 0)) / pace
        # The prompt may be behind by up to one slice.
        assert share >= total / 3 - 4 * max(MIN_SECONDS, MIN_CHUNK / pace), f"after {slices} slices"


@pytest.mark.parametrize("pace", [300, 1000, 3000, 10_000, 100_000])
@pytest.mark.parametrize("max_chunk", [128, 1024])
def test_a_short_prompt_does_not_wait_for_long_ones(pace: float, max_chunk: int) -> None:
    machine = Machine(pace, max_chunk)
    machine.warm()
    machine.remaining = dict.fromkeys(range(5), 4000)
    machine.slice()
    machine.remaining[9] = 100
    total = 0.0
    while 9 in machine.remaining:
        machine.slice()
        total += machine.seconds
    assert total <= 3 * 100 / pace + 2 * max(MIN_SECONDS, MIN_CHUNK / pace)


def test_equal_prompts_finish_in_order_of_arrival() -> None:
    machine = Machine(10_000)
    machine.warm()
    machine.remaining = dict.fromkeys(range(5), 1000)
    ended: list[int] = []
    while machine.remaining:
        before = list(machine.remaining)
        machine.slice()
        ended += [row for row in before if row not in machine.remaining]
    assert ended == [0, 1, 2, 3, 4]


def test_many_small_prompts_finish_in_one_slice() -> None:
    machine = Machine(20_000)
    machine.warm()
    machine.remaining = dict.fromkeys(range(8), 20)
    machine.slice()
    assert not machine.remaining


def test_prompts_without_remaining_tokens_cost_no_time() -> None:
    """Take prompts of one token or found in the prefix cache: none of their tokens remain."""
    machine = Machine(1000)
    machine.warm()
    machine.remaining = {0: 4000, 1: 0, 2: 0}
    machine.slice()
    assert set(machine.remaining) == {0}


def test_without_prompts_there_are_no_chunks() -> None:
    machine = Machine(1000)
    machine.slice()
    assert machine.chunks == []


def test_many_new_prompts_are_not_held_up_by_one_stream() -> None:
    """Let the batch grow soon instead of decoding a small one for long."""
    machine = Machine(5000, max_chunk=1024)
    machine.warm()
    machine.remaining = dict.fromkeys(range(15), 1000)
    machine.slice(decode_seconds=0.04, decoding=1)
    assert 0.2 <= machine.seconds <= MAX_SECONDS * 1.001


def test_one_new_prompt_does_not_hold_up_many_streams() -> None:
    machine = Machine(5000, max_chunk=1024)
    machine.warm()
    machine.remaining = {0: 4000}
    machine.slice(decode_seconds=0.04, decoding=15)
    # Never less than two decode steps: below that, a chunk takes as long anyway.
    assert machine.seconds <= 0.08 * 1.001


@pytest.mark.parametrize("length", [65, 129, 130, 200, 255])
def test_no_small_last_chunk_remains(length: int) -> None:
    """Avoid a last chunk of two tokens, which would take as long as one of sixty."""
    machine = Machine(50_000, max_chunk=128)
    machine.warm()
    machine.remaining = {0: length}
    while machine.remaining:
        machine.slice(decoding=0)
        assert min(count for _, count in machine.chunks) >= 32
