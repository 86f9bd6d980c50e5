"""Writing of prefixes to disk and reading them back, with blocks of plain tokens."""

from __future__ import annotations

import random
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from runner_server.engine.prefix_cache import PrefixCache
from runner_server.engine.prefix_disk import BLOCK_TOKENS, BlockStore, DiskTier, block_files
from runner_server.engine.prefix_disk import store as store_module
from runner_server.engine.prefix_disk import tier as tier_module
from runner_server.engine.prefix_disk.names import block_names

Tokens = tuple[int, ...]
TOKEN_BYTES = 4
BLOCK_BYTES = TOKEN_BYTES * BLOCK_TOKENS
PLENTY = 1 << 20
WAIT_SECONDS = 20.0
NAN = -1
"""Token whose keys are not finite."""


class TokenBlocks:
    """Operations on segments of tokens, in memory and as bytes."""

    needs_snapshot = False
    block_bytes = BLOCK_BYTES

    def cut(self, segment: Tokens, start: int, end: int) -> Tokens:
        """See ``SegmentOps.cut``."""
        return segment[start:end]

    def segment_bytes(self, segment: Tokens) -> int:
        """See ``SegmentOps.segment_bytes``."""
        return TOKEN_BYTES * len(segment)

    def snapshot_bytes(self, _snapshot: None) -> int:
        """See ``SegmentOps.snapshot_bytes``."""
        return 0

    def encode(self, segments: Sequence[Tokens]) -> bytes | None:
        """See ``BlockOps.encode``."""
        tokens = [token for segment in segments for token in segment]
        return None if NAN in tokens else array("i", tokens).tobytes()

    def decode(self, payload: bytearray) -> Tokens:
        """See ``BlockOps.decode``."""
        tokens = array("i")
        tokens.frombytes(payload)
        return tuple(tokens)


class Tiers:
    """A prefix cache in memory over a directory, as after a start of the process."""

    def __init__(self, directory: Path, budget: int = PLENTY, key: bytes = b"model") -> None:
        self.cache: PrefixCache[Tokens, None] = PrefixCache(TokenBlocks(), budget)
        self.store = BlockStore(directory, PLENTY, BLOCK_BYTES)
        self.disk = DiskTier(self.cache, TokenBlocks(), self.store, key)

    def put(self, row: int, tokens: Sequence[int], salt: str = "") -> None:
        """Insert tokens into memory, and note them."""
        self.cache.insert(tokens, lambda start, end: tuple(tokens[start:end]), salt=salt)
        self.disk.note(row, tokens, salt)

    def save(self) -> None:
        """Write all noted sequences."""
        while self.disk.save_some(WAIT_SECONDS):
            pass
        assert self.store.wait_room(WAIT_SECONDS)
        self.store.cancel_room()

    def promote(self, tokens: Sequence[int], salt: str = "", row: int = 0) -> int:
        """Copy a prefix from disk to memory; return the length of the copy."""
        while self.disk.promote(row, tokens, salt, WAIT_SECONDS):
            pass
        count, segments, _ = self.cache.lookup(tokens, salt)
        assert sum(segments, ()) == tuple(tokens)[:count]
        return count

    def close(self) -> None:
        """End the threads."""
        self.disk.drop_noted()
        self.store.close(WAIT_SECONDS)


Start = Callable[..., Tiers]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start with an empty memory over the directory of the test."""
    started: list[Tiers] = []

    def start_(budget: int = PLENTY, key: bytes = b"model") -> Tiers:
        started.append(Tiers(tmp_path, budget, key))
        return started[-1]

    yield start_
    for each in started:
        each.close()


def _prompt(length: int, seed: int = 0) -> Tokens:
    return tuple(random.Random(seed).choices(range(1000), k=length))  # noqa: S311 - test data


def _blocks(count: float) -> int:
    return int(count * BLOCK_TOKENS)


def test_whole_blocks_of_a_prompt_survive_a_restart(start: Start) -> None:
    prompt = _prompt(_blocks(3.5))
    first = start()
    first.put(0, prompt)
    first.save()
    second = start()
    assert second.disk.find(prompt, "") == _blocks(3)
    assert second.promote(prompt) == _blocks(3)
    # Nothing is written again.
    second.put(0, prompt)
    second.save()
    assert second.store.counters.written_bytes == 0


def test_what_prompts_share_is_written_once(start: Start) -> None:
    system = _prompt(_blocks(2))
    first = start()
    for row in range(5):
        first.put(row, [*system, *_prompt(_blocks(1), 1 + row)])
    first.save()
    (one_block,) = {path.stat().st_size for path in first.store._directory.glob("*.kv")}
    assert first.store.counters.written_bytes == (2 + 5) * one_block
    second = start()
    assert second.promote([*system, *_prompt(300, 99)]) == _blocks(2)


def test_a_row_that_goes_on_writes_only_what_is_new(start: Start) -> None:
    prompt = _prompt(_blocks(4))
    tiers = start()
    for length in range(100, len(prompt) + 1, 100):
        tiers.put(0, prompt[:length])
        tiers.disk.save_some(0)
    tiers.put(0, prompt)
    tiers.save()
    assert len([*tiers.store._directory.glob("*.kv")]) == 4
    assert start().disk.find(prompt, "") == _blocks(4)


def test_a_block_may_consist_of_parts_of_several_entries(start: Start) -> None:
    prompt = _prompt(_blocks(2))
    first = start()
    for cut in (50, 130, 200, len(prompt)):
        first.put(cut, [*prompt[:cut], *_prompt(5, cut)])
    first.put(0, prompt)
    first.save()
    assert start().promote(prompt) == _blocks(2)


def test_a_prompt_partly_in_memory_takes_the_rest_from_disk(start: Start) -> None:
    prompt = _prompt(_blocks(4))
    first = start()
    first.put(0, prompt)
    first.save()
    second = start()
    second.put(0, prompt[: _blocks(1.5)])
    assert second.promote(prompt) == _blocks(4)
    assert second.store.counters.read_bytes < first.store.counters.written_bytes


@pytest.mark.parametrize(("wrote", "asks"), [("", "a"), ("a", ""), ("a", "b"), ("a", "a ")])
def test_entries_of_another_salt_are_not_found(start: Start, wrote: str, asks: str) -> None:
    prompt = _prompt(_blocks(2))
    first = start()
    first.put(0, prompt, wrote)
    first.save()
    second = start()
    assert second.disk.find(prompt, asks) == 0
    assert second.promote(prompt, asks) == 0
    assert second.promote(prompt, wrote) == _blocks(2)


def test_entries_of_another_model_are_not_found(start: Start) -> None:
    prompt = _prompt(_blocks(2))
    first = start()
    first.put(0, prompt)
    first.save()
    assert start(key=b"other").disk.find(prompt, "") == 0


def test_names_depend_on_every_token_before_the_end_of_a_block() -> None:
    prompt = array("i", _prompt(_blocks(3)))
    names = block_names(b"model", "", prompt)
    for changed in (0, _blocks(1) - 1, _blocks(1), _blocks(2.5)):
        other = array("i", prompt)
        other[changed] += 1
        same = sum(a == b for a, b in zip(names, block_names(b"model", "", other), strict=True))
        assert same == changed // BLOCK_TOKENS


def test_names_do_not_show_salts_or_tokens(start: Start, tmp_path: Path) -> None:
    tiers = start()
    tiers.put(0, _prompt(_blocks(1)), "customer-4711")
    tiers.save()
    (file,) = tmp_path.iterdir()
    assert "4711" not in file.name
    assert b"customer" not in file.read_bytes()


# -- not written -----------------------------------------------------------------


def test_numbers_that_are_not_finite_never_reach_the_disk(start: Start, tmp_path: Path) -> None:
    prompt = [*_prompt(_blocks(1)), NAN, *_prompt(_blocks(2), 1)]
    tiers = start()
    tiers.put(0, prompt)
    tiers.put(1, _prompt(_blocks(1), 2))
    tiers.save()
    assert len([*tmp_path.iterdir()]) == 2
    assert tiers.disk.find(prompt, "") == _blocks(1)


def test_a_failed_prompt_is_removed(start: Start, tmp_path: Path) -> None:
    prompt = _prompt(_blocks(3))
    tiers = start()
    tiers.put(0, prompt)
    for _ in range(2):
        tiers.disk.save_some(WAIT_SECONDS)
    tiers.disk.end(0, has_failed=True)
    tiers.disk.forget(prompt, "")
    tiers.close()
    assert not [*tmp_path.iterdir()]


def test_an_entry_that_was_evicted_before_is_not_written(start: Start, tmp_path: Path) -> None:
    tiers = start()
    tiers.put(0, _prompt(_blocks(2)))
    tiers.cache.limit(0)
    tiers.put(1, _prompt(5))
    tiers.save()
    assert not [*tmp_path.iterdir()]


def test_a_writer_that_is_busy_costs_no_time_and_loses_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    write = block_files.write_block

    def wait(directory: Path, name: str, payload: bytes) -> None:
        assert goes_on.wait(WAIT_SECONDS)
        write(directory, name, payload)

    monkeypatch.setattr(store_module, "write_block", wait)
    prompt, tiers = _prompt(_blocks(4)), start()
    tiers.put(0, prompt)
    assert [tiers.disk.save_some(0) for _ in range(5)] == [True] * 5
    goes_on.set()
    tiers.save()
    assert start().disk.find(prompt, "") == _blocks(4)


def test_sequences_that_wait_are_bounded(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_module, "_MOST_WAITING", 3)
    tiers = start()
    for row in range(10):
        tiers.put(row, _prompt(_blocks(1), row))
    assert len(tiers.disk._waiting) == 3


# -- not read --------------------------------------------------------------------


def test_a_damaged_block_ends_the_prefix(start: Start, tmp_path: Path) -> None:
    prompt = _prompt(_blocks(4))
    first = start()
    first.put(0, prompt)
    first.save()
    damaged = block_names(b"model", "", array("i", prompt))[2]
    path = tmp_path / f"{damaged}.kv"
    path.write_bytes(path.read_bytes()[:-1])
    second = start()
    assert second.promote(prompt) == _blocks(2)
    assert second.disk.find(prompt, "") == _blocks(2)
    # It is evaluated and written again.
    second.put(0, prompt)
    second.save()
    assert start().promote(prompt) == _blocks(4)


@pytest.mark.parametrize("blocks", [0, 0.5, 1, 2.5])
def test_no_more_is_copied_than_memory_holds(start: Start, blocks: float) -> None:
    prompt = _prompt(_blocks(4))
    first = start()
    first.put(0, prompt)
    first.save()
    second = start(budget=_blocks(blocks) * TOKEN_BYTES)
    assert second.promote(prompt) == _blocks(blocks)
    assert second.cache.nbytes <= second.cache.usage.limit_bytes


def test_a_prefix_evicted_during_its_copy_is_given_up(start: Start) -> None:
    prompt = _prompt(_blocks(4))
    first = start()
    first.put(0, prompt)
    first.save()
    second = start()
    assert second.disk.promote(0, prompt, "", WAIT_SECONDS)
    second.cache.limit(0)
    second.cache.limit(PLENTY)
    assert not second.disk.promote(0, prompt, "", WAIT_SECONDS)


def test_prompts_may_take_turns(start: Start) -> None:
    prompts = [_prompt(_blocks(3), seed) for seed in range(2)]
    first = start()
    for row, prompt in enumerate(prompts):
        first.put(row, prompt)
    first.save()
    second = start()
    going = {0, 1}
    while going:
        going = {row for row in going if second.disk.promote(row, prompts[row], "", WAIT_SECONDS)}
    assert [second.promote(prompt) for prompt in prompts] == [_blocks(3)] * 2


def test_a_disk_that_hangs_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = _prompt(_blocks(2))
    first = start()
    first.put(0, prompt)
    first.save()
    goes_on = threading.Event()
    read = block_files.read_block

    def wait(directory: Path, name: str, size: int) -> bytearray:
        assert goes_on.wait(WAIT_SECONDS)
        return read(directory, name, size)

    monkeypatch.setattr(store_module, "read_block", wait)
    second = start()
    assert second.disk.promote(0, prompt, "", 0)
    monkeypatch.setattr(tier_module, "_PATIENCE_SECONDS", 0.0)
    assert not second.disk.promote(0, prompt, "", 0)
    # The next prompt does not wait as long.
    monkeypatch.setattr(tier_module, "_PATIENCE_SECONDS", 5.0)
    assert second.disk.find(prompt, "") == 0
    assert not second.disk.promote(1, prompt, "", 0)
    goes_on.set()
    second.disk.end(0)
    monkeypatch.setattr(second.disk, "_paused_until", 0.0)
    assert second.promote(prompt) == _blocks(2)


def test_no_more_blocks_are_read_ahead_than_are_counted(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = _prompt(_blocks(9))
    first = start()
    first.put(0, prompt)
    first.save()
    second = start()
    asked: list[str] = []
    read = second.store.read

    def note(name: str) -> Any:
        asked.append(name)
        return read(name)

    monkeypatch.setattr(second.store, "read", note)
    for i in range(3):
        assert second.disk.promote(0, prompt, "", WAIT_SECONDS)
        assert len(asked) <= i + 2
