"""The radix tree of the prefix cache: matches, contents and eviction.

Segments here are the tokens themselves, so every match can be checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner_server.engine.prefix_cache import Match, PrefixCache

Tokens = tuple[int, ...]

TOKEN_BYTES = 4
SNAPSHOT_BYTES = 10
PLENTY = 1 << 30


class TokenSegments:
    """Operations on segments of tokens; a snapshot is the tuple of all tokens before it."""

    def __init__(self, *, needs_snapshot: bool) -> None:
        self._needs_snapshot = needs_snapshot

    @property
    def needs_snapshot(self) -> bool:
        """See ``Pieces.needs_snapshot``."""
        return self._needs_snapshot

    def cut(self, segment: Tokens, start: int, end: int) -> Tokens:
        """See ``Pieces.cut``."""
        assert 0 <= start < end <= len(segment)
        return segment[start:end]

    def segment_bytes(self, segment: Tokens) -> int:
        """See ``Pieces.segment_bytes``."""
        return TOKEN_BYTES * len(segment)

    def snapshot_bytes(self, _snapshot: Tokens) -> int:
        """See ``Pieces.snapshot_bytes``."""
        return SNAPSHOT_BYTES


Tree = PrefixCache[Tokens, Tokens]


def _tree(budget: int = PLENTY, *, snapshots: bool = False) -> Tree:
    return PrefixCache(TokenSegments(needs_snapshot=snapshots), budget)


def _offer(
    tree: Tree, tokens: Sequence[int], salt: str = "", *, snapshots: bool = False
) -> list[int]:
    """Offer a run; return the numbers of tokens copied, one for each copy."""
    run = tuple(tokens)
    copied: list[int] = []

    def segment(start: int, end: int) -> Tokens:
        assert 0 <= start < end == len(run)
        copied.append(end - start)
        return run[start:end]

    tree.insert(run, segment, (lambda: run) if snapshots else None, salt=salt)
    return copied


def _take(tree: Tree, tokens: Sequence[int], salt: str = "", *, snapshots: bool = False) -> int:
    """Return the number of cached tokens, after checking the segments and snapshot."""
    usable = tree.match(tokens, salt).usable
    count, segments, snapshot = tree.lookup(tokens, salt)
    assert count == usable
    assert sum(segments, ()) == tuple(tokens)[:count]
    assert snapshot == (tuple(tokens)[:count] if snapshots and count else None)
    return count


def _nodes(tree: Tree) -> Iterator[Any]:
    waiting: list[Any] = [node for root in tree._roots.values() for node in root.children.values()]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += node.children.values()


def _check(tree: Tree, budget: int) -> None:
    """Compare the tree's counters and order of use with its nodes."""
    nodes = list(_nodes(tree))
    held = sum(TOKEN_BYTES * len(node.segment) for node in nodes)
    held += sum(SNAPSHOT_BYTES for node in nodes if node.snapshot is not None)
    assert tree.nbytes == held <= budget
    order = {node: position for position, node in enumerate(tree._lru)}
    assert set(order) == set(nodes)
    assert len(tree) == len(nodes)
    for salt, root in tree._roots.items():
        assert root.salt == salt
        assert root.children, "the tree of a salt is empty"
    for node in nodes:
        assert tuple(node.tokens) == node.segment
        assert node.tokens
        for first, child in node.children.items():
            assert child.parent is node
            assert first == child.tokens[0]
            assert order[child] < order[node], "a beginning would go before what continues it"


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


RUNS = st.lists(st.integers(0, 2), max_size=12).map(tuple)
KINDS = st.sampled_from(["offer", "take", "match"])
SALTS = st.sampled_from(["", "", "a", "b"])
OPERATIONS = st.lists(st.tuples(KINDS, RUNS, SALTS), max_size=40)


@pytest.mark.parametrize("snapshots", [False, True])
@given(operations=OPERATIONS)
@settings(max_examples=150, deadline=None)
def test_everything_offered_is_found_while_there_is_room(
    operations: list[tuple[str, Tokens, str]], snapshots: bool
) -> None:
    tree = _tree(snapshots=snapshots)
    by_salt: dict[str, list[Tokens]] = {"": [], "a": [], "b": []}
    for kind, run, salt in operations:
        offered = by_salt[salt]
        common = max((_common(run, other) for other in offered), default=0)
        whole = max((len(o) for o in offered if run[: len(o)] == o), default=0)
        known = whole if snapshots else common
        if kind == "offer":
            copied = _offer(tree, run, salt, snapshots=snapshots)
            assert copied == [len(run) - common] * (common < len(run))
            offered.append(run)
        elif kind == "take":
            assert _take(tree, run, salt, snapshots=snapshots) == known
        else:
            assert tree.match(run, salt) == Match(known, common)
        _check(tree, PLENTY)


@pytest.mark.parametrize("snapshots", [False, True])
@given(operations=OPERATIONS, budget=st.integers(0, 160))
@settings(max_examples=150, deadline=None)
def test_the_tree_stays_in_its_budget_and_returns_only_offered_tokens(
    operations: list[tuple[str, Tokens, str]], budget: int, snapshots: bool
) -> None:
    tree = _tree(budget, snapshots=snapshots)
    by_salt: dict[str, list[Tokens]] = {"": [], "a": [], "b": []}
    for kind, run, salt in operations:
        offered = by_salt[salt]
        if kind == "offer":
            offered.append(run)
            _offer(tree, run, salt, snapshots=snapshots)
        else:
            common = max((_common(run, other) for other in offered), default=0)
            match = tree.match(run, salt)
            assert match.usable <= match.common <= common
            assert _take(tree, run, salt, snapshots=snapshots) == match.usable
        _check(tree, budget)


def _run(name: int, length: int = 10) -> Tokens:
    """Return a run without a common prefix with runs of other names."""
    return tuple(1000 * name + i for i in range(length))


def test_the_least_recently_used_entry_is_evicted_first() -> None:
    tree = _tree(3 * 10 * TOKEN_BYTES)
    for name in (1, 2, 3):
        _offer(tree, _run(name))
    _offer(tree, _run(4))
    assert [_take(tree, _run(name)) for name in (1, 2, 3, 4)] == [0, 10, 10, 10]


@pytest.mark.parametrize("hit", ["whole", "part", "offer"])
def test_a_used_entry_is_kept(hit: str) -> None:
    tree = _tree(3 * 10 * TOKEN_BYTES)
    for name in (1, 2, 3):
        _offer(tree, _run(name))
    if hit == "offer":
        assert not _offer(tree, _run(1))
    else:
        assert _take(tree, _run(1)[: 10 if hit == "whole" else 4])
    _offer(tree, _run(4))
    assert [_take(tree, _run(name)) for name in (1, 2, 3, 4)] == [10, 0, 10, 10]


def test_salts_share_the_budget_but_no_entries() -> None:
    tree = _tree(3 * 10 * TOKEN_BYTES)
    for salt in ("a", "b", ""):
        assert _offer(tree, _run(1), salt) == [10]
    assert [_take(tree, _run(1), salt) for salt in ("", "a", "b", "c")] == [10, 10, 10, 0]
    # Evicts the entry used least recently, whatever its salt.
    _offer(tree, _run(2), "c")
    assert [_take(tree, _run(1), salt) for salt in ("", "a", "b")] == [0, 10, 10]


def test_a_tree_that_makes_room_for_its_own_new_entry_is_kept() -> None:
    tree = _tree(10 * TOKEN_BYTES)
    _offer(tree, _run(1), "a")
    _offer(tree, _run(2), "a")
    assert [_take(tree, _run(name), "a") for name in (1, 2)] == [0, 10]
    _check(tree, 10 * TOKEN_BYTES)


def test_a_failed_prompt_is_forgotten_in_its_own_tree() -> None:
    tree = _tree()
    for salt in ("", "a"):
        _offer(tree, (1, 2, 3), salt)
    tree.forget((1, 2, 3), lambda _segment, _snapshot: False, "a")
    assert [_take(tree, (1, 2, 3), salt) for salt in ("", "a")] == [3, 0]


def test_a_match_does_not_count_as_a_use() -> None:
    tree = _tree(2 * 10 * TOKEN_BYTES)
    _offer(tree, _run(1))
    _offer(tree, _run(2))
    assert tree.match(_run(1)).usable == 10
    _offer(tree, _run(3))
    assert tree.match(_run(1)).usable == 0


@pytest.mark.parametrize("snapshots", [False, True])
def test_a_shared_prefix_outlives_its_continuations(snapshots: bool) -> None:
    """Send many requests with one system prompt, with room for two of them."""
    system = _run(0, 50)
    tree = _tree(70 * TOKEN_BYTES + 4 * SNAPSHOT_BYTES, snapshots=snapshots)
    _offer(tree, system, snapshots=snapshots)
    for name in range(1, 60):
        prompt = system + _run(name)
        assert _take(tree, prompt, snapshots=snapshots) == 50
        _offer(tree, prompt, snapshots=snapshots)
        assert _take(tree, prompt, snapshots=snapshots) == 60
    _check(tree, 70 * TOKEN_BYTES + 4 * SNAPSHOT_BYTES)


def test_a_long_run_is_evicted_from_its_end() -> None:
    """Offer a prompt chunk by chunk, as prefill does."""
    tree = _tree(40 * TOKEN_BYTES)
    for end in (10, 20, 30, 40):
        _offer(tree, _run(1, 40)[:end])
    known = []
    for name in (2, 3, 4):
        _offer(tree, _run(name))
        known.append(tree.match(_run(1, 40)).usable)
    assert known == [30, 20, 10]


def test_a_run_that_diverges_shares_the_common_prefix() -> None:
    tree = _tree()
    assert _offer(tree, (1, 2, 3, 4)) == [4]
    assert _offer(tree, (1, 2, 8, 9)) == [2]
    assert tree.nbytes == 6 * TOKEN_BYTES
    assert len(tree) == 3
    assert [_take(tree, run) for run in ((1, 2, 3, 4), (1, 2, 8, 9), (1, 2, 5), (7,))] == [
        4,
        4,
        2,
        0,
    ]


def test_without_a_budget_nothing_is_kept() -> None:
    tree = _tree(0)
    assert not tree.is_enabled
    _offer(tree, (1, 2, 3))
    assert (tree.nbytes, len(tree), _take(tree, (1, 2, 3))) == (0, 0, 0)
    assert _tree(1).is_enabled


def test_a_run_over_the_budget_evicts_nothing() -> None:
    """Evict nothing for a run over the budget, which cannot be kept anyway."""
    tree = _tree(30 * TOKEN_BYTES)
    _offer(tree, _run(1))
    _offer(tree, _run(2))
    _offer(tree, _run(3, 31))
    assert [_take(tree, _run(name, 31)) for name in (1, 2, 3)] == [10, 10, 0]
    # A continuation of a cached run has less room, as that run is not evicted for it.
    _offer(tree, _run(1, 31))
    assert [_take(tree, _run(name, 31)) for name in (1, 2)] == [10, 10]
    _check(tree, 30 * TOKEN_BYTES)


def test_a_snapshot_over_the_budget_evicts_nothing() -> None:
    tree = _tree(9, snapshots=True)
    _offer(tree, (1,), snapshots=False)
    _offer(tree, (2,), snapshots=True)
    assert tree.match((1,)).common == 1


def test_a_prefix_is_usable_only_at_a_snapshot() -> None:
    tree = _tree(snapshots=True)
    system, first, second = _run(0, 40), _run(1), _run(2)
    _offer(tree, system + first, snapshots=True)
    assert tree.match(system + second) == Match(usable=0, common=40)
    assert tree.match((system + first)[:49]) == Match(usable=0, common=49)
    assert _take(tree, system + first + second, snapshots=True) == 50
    # The second prompt stops where it leaves the first; later ones start from there.
    assert not _offer(tree, system, snapshots=True)
    _offer(tree, system + second, snapshots=True)
    assert tree.match(system + _run(3)) == Match(usable=40, common=40)
    assert _take(tree, system + first, snapshots=True) == 50
    assert _take(tree, system + second, snapshots=True) == 50
    assert tree.nbytes == 60 * TOKEN_BYTES + 3 * SNAPSHOT_BYTES


def test_a_snapshot_is_taken_once() -> None:
    tree = _tree(snapshots=True)
    taken: list[Tokens] = []

    def snapshot() -> Tokens:
        taken.append((1, 2))
        return (1, 2)

    for _ in range(3):
        tree.insert((1, 2), lambda start, end: (1, 2)[start:end], snapshot)
    assert taken == [(1, 2)]
    assert tree.nbytes == 2 * TOKEN_BYTES + SNAPSHOT_BYTES


def test_an_error_while_copying_leaves_the_tree_intact() -> None:
    """Raise as the library may; entries made before stay correct."""

    def broken(_start: int, _end: int) -> Tokens:
        raise MemoryError

    tree = _tree()
    _offer(tree, (1, 2, 3))
    for run in ((1, 2, 9), (7, 7), (1, 2, 3, 4)):
        with pytest.raises(MemoryError):
            tree.insert(run, broken)
        _check(tree, PLENTY)
    assert _take(tree, (1, 2, 3, 4)) == 3


def test_forgetting_a_prompt_keeps_the_prefix_of_others() -> None:
    tree = _tree()
    for run in ((1, 2, 3, 4), (1, 2, 5, 6), (1, 2, 5, 6, 7)):
        _offer(tree, run)
    tree.forget((1, 2, 5, 6, 7), lambda _segment, _snapshot: True)
    assert _take(tree, (1, 2, 3, 4)) == 4
    assert _take(tree, (1, 2, 5, 6)) == 2


def test_forgetting_a_prompt_keeps_its_continuations() -> None:
    tree = _tree()
    _offer(tree, (1, 2, 3, 4))
    tree.forget((1, 2), lambda _segment, _snapshot: True)
    assert _take(tree, (1, 2, 3, 4)) == 4


def test_forgetting_drops_a_broken_segment_with_its_continuations() -> None:
    tree = _tree()
    for run in ((1, 2, 3), (1, 2, 9, 4), (1, 2, 9, 5)):
        _offer(tree, run)
    tree.forget((1, 2, 9, 4), lambda segment, _snapshot: 9 not in segment)
    assert _take(tree, (1, 2, 9, 5)) == 2
    assert _take(tree, (1, 2, 3)) == 3
    assert tree.nbytes == sum(node.nbytes for node in _nodes(tree)) == 3 * TOKEN_BYTES
