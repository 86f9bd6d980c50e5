"""A tree of evaluated prompts, so that what prompts share is evaluated once.

Each node stands for a run of tokens and holds what the model's caches hold for
them; prompts that begin alike share the nodes of their beginning. Nothing here
knows what the pieces are: :class:`SegmentOps` cuts and weighs them.

The bytes stay under a budget: what was not used for longest goes first, and a node
never before those that continue it. So a beginning that many prompts share, such
as a system prompt, stays longest.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

S = TypeVar("S")
"""What the caches hold for a run of tokens; may be cut."""

T = TypeVar("T")
"""What else the caches hold after the last of them; may not."""

T_contra = TypeVar("T_contra", contravariant=True)


class SegmentOps(Protocol[S, T_contra]):
    """Cuts and weighs what the tree holds."""

    @property
    def needs_snapshot(self) -> bool:
        """Whether a beginning is of use only where a snapshot was taken."""
        ...

    def cut(self, segment: S, start: int, end: int) -> S:
        """Copies a part of a segment."""
        ...

    def segment_bytes(self, segment: S) -> int:
        """Bytes it holds."""
        ...

    def snapshot_bytes(self, snapshot: T_contra) -> int:
        """Bytes it holds."""
        ...


@dataclass(frozen=True)
class Match:
    """How much of a prompt the tree knows.

    Attributes:
        usable: Tokens that need not be evaluated again.
        common: Tokens that some earlier prompt had too, usable or not.
    """

    usable: int
    common: int


@dataclass
class CacheUsage:
    """How many bytes a tree holds and may hold; does not keep the tree alive.

    Attributes:
        limit_bytes: The most it may hold now.
        nbytes: What it holds.
    """

    limit_bytes: int
    nbytes: int = 0


class _Root(Generic[S, T]):
    """Where every prompt begins."""

    def __init__(self) -> None:
        self.children: dict[int, _Node[S, T]] = {}


class _Node(_Root[S, T]):
    """A run of tokens after those of its parents."""

    def __init__(self, tokens: array[int], parent: _Root[S, T], segment: S) -> None:
        super().__init__()
        self.tokens = tokens
        self.parent = parent
        self.segment = segment
        self.snapshot: T | None = None
        self.nbytes = 0


class PrefixCache(Generic[S, T]):
    """Evaluated prompts under a byte budget.

    Args:
        ops: Cuts and weighs what is held.
        budget_bytes: The most it may hold; 0 holds nothing.
    """

    def __init__(self, ops: SegmentOps[S, T], budget_bytes: int) -> None:
        self._ops = ops
        self._root: _Root[S, T] = _Root()
        # Oldest use first. A node is always used after those that continue it.
        self._lru: OrderedDict[_Node[S, T], None] = OrderedDict()
        self.usage = CacheUsage(budget_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self.usage.nbytes

    def __len__(self) -> int:
        return len(self._lru)

    @property
    def is_enabled(self) -> bool:
        """Whether anything is kept."""
        return self.usage.limit_bytes > 0

    def limit(self, limit_bytes: int) -> None:
        """Change the most it may hold; evicts what was not used for longest to get there."""
        self.usage.limit_bytes = limit_bytes
        while self.nbytes > limit_bytes:
            self._evict(next(iter(self._lru)))

    def match(self, tokens: Sequence[int]) -> Match:
        """How much of a prompt is cached; counts as no use of it."""
        path = self._walk(array("i", tokens))
        common = sum(length for _, length in path)
        if not self._ops.needs_snapshot:
            return Match(common, common)
        return Match(self._deepest_snapshot(path)[1], common)

    def lookup(self, tokens: Sequence[int]) -> tuple[int, list[S], T | None]:
        """What is cached of the beginning of a prompt.

        Returns:
            For how many tokens, their segments in order, and the snapshot after them.
        """
        path = self._walk(array("i", tokens))
        snapshot: T | None = None
        if self._ops.needs_snapshot:
            count, _ = self._deepest_snapshot(path)
            path = path[:count]
            snapshot = path[-1][0].snapshot if path else None
        self._touch([node for node, _ in path])
        segments = [self._segment_part(node, length) for node, length in path]
        return sum(length for _, length in path), segments, snapshot

    def insert(
        self,
        tokens: Sequence[int],
        segment: Callable[[int, int], S],
        snapshot: Callable[[], T] | None = None,
        *,
        token_bytes: int = 0,
    ) -> None:
        """Keeps what was evaluated, as far as the budget allows.

        Args:
            tokens: A prompt's beginning, all of it evaluated.
            segment: Copies what the caches hold for the tokens from the first to before
                the second; called only for what the tree does not hold yet.
            snapshot: Copies what cannot be cut, as it stands after the last token.
            token_bytes: What one token will take, if that is known: then no more is copied
                than there may be room for.
        """
        run = array("i", tokens)
        path = self._walk(run)
        cached = sum(length for _, length in path)
        if token_bytes and (fitting := self.usage.limit_bytes // token_bytes) < len(run):
            run, snapshot = run[: max(cached, fitting)], None
        node = self._node_ending(path)
        self._touch(_path_to(node))
        if cached < len(run):
            # Before the copy is made, so that old and new are never there together.
            if not self._evict_to_fit(token_bytes * (len(run) - cached), node):
                return
            grown = self._append(node, run[cached:], segment(cached, len(run)))
            if grown is None:
                return
            node = grown
        if snapshot and isinstance(node, _Node) and node.snapshot is None:
            self._attach(node, snapshot())

    def forget(self, tokens: Sequence[int], is_sound: Callable[[S, T | None], bool]) -> None:
        """Drops what a prompt that failed has left, and what others have built on a part of it.

        Args:
            tokens: All that was evaluated.
            is_sound: Whether pieces may be kept: of what the prompt shares with others, the
                rest stays.
        """
        path = self._walk(array("i", tokens))
        for node, _ in path:
            if not is_sound(node.segment, node.snapshot):
                self._evict_subtree(node)
                break
        for node, length in reversed(path):
            is_own = length == len(node.tokens) and not node.children
            if is_own and node in self._lru:
                self._evict(node)

    # -- walking -----------------------------------------------------------------

    def _walk(self, tokens: array[int]) -> list[tuple[_Node[S, T], int]]:
        """The nodes that begin a prompt, and how many tokens of each it has."""
        path = []
        node: _Root[S, T] = self._root
        at = 0
        while at < len(tokens) and (child := node.children.get(tokens[at])):
            length = _common_length(child.tokens, tokens[at : at + len(child.tokens)])
            path.append((child, length))
            at += length
            if length < len(child.tokens):
                break
            node = child
        return path

    def _deepest_snapshot(self, path: list[tuple[_Node[S, T], int]]) -> tuple[int, int]:
        """How many nodes, and how many tokens, up to the last with a snapshot."""
        best, total = (0, 0), 0
        for count, (node, length) in enumerate(path, start=1):
            total += length
            if node.snapshot is not None and length == len(node.tokens):
                best = (count, total)
        return best

    def _segment_part(self, node: _Node[S, T], length: int) -> S:
        if length == len(node.tokens):
            return node.segment
        return self._ops.cut(node.segment, 0, length)

    def _node_ending(self, path: list[tuple[_Node[S, T], int]]) -> _Root[S, T]:
        """The node that ends where a path does; one that goes on is split there."""
        if not path:
            return self._root
        node, length = path[-1]
        return node if length == len(node.tokens) else self._split(node, length)

    # -- changing ----------------------------------------------------------------

    def _split(self, node: _Node[S, T], at: int) -> _Node[S, T]:
        """Puts a node for the first tokens of another above it."""
        first = self._ops.cut(node.segment, 0, at)
        upper = _Node(node.tokens[:at], node.parent, first)
        node.segment = self._ops.cut(node.segment, at, len(node.tokens))
        node.parent.children[upper.tokens[0]] = upper
        node.tokens, node.parent = node.tokens[at:], upper
        upper.children[node.tokens[0]] = node
        self._lru[upper] = None
        self._update_size(upper)
        self._update_size(node)
        return upper

    def _append(self, parent: _Root[S, T], tokens: array[int], segment: S) -> _Node[S, T] | None:
        """Adds a node, if there is room beside those that lead to it."""
        if not self._evict_to_fit(self._ops.segment_bytes(segment), parent):
            return None
        node = _Node[S, T](tokens, parent, segment)
        parent.children[tokens[0]] = node
        # Used before those that lead to it, so that it goes before them.
        self._lru[node] = None
        self._touch(_path_to(node))
        self._update_size(node)
        return node

    def _attach(self, node: _Node[S, T], snapshot: T) -> None:
        if self._evict_to_fit(self._ops.snapshot_bytes(snapshot), node):
            node.snapshot = snapshot
            self._update_size(node)

    def _update_size(self, node: _Node[S, T]) -> None:
        before = node.nbytes
        node.nbytes = self._ops.segment_bytes(node.segment)
        if node.snapshot is not None:
            node.nbytes += self._ops.snapshot_bytes(node.snapshot)
        self.usage.nbytes += node.nbytes - before

    def _evict_to_fit(self, needed: int, keep: _Root[S, T]) -> bool:
        """Drops what was not used for longest, but for a node and those that lead to it."""
        if sum(node.nbytes for node in _path_to(keep)) + needed > self.usage.limit_bytes:
            return False
        while self.nbytes + needed > self.usage.limit_bytes:
            # Never one of those: they were used last.
            self._evict(next(iter(self._lru)))
        return True

    def _evict(self, node: _Node[S, T]) -> None:
        del node.parent.children[node.tokens[0]]
        del self._lru[node]
        self.usage.nbytes -= node.nbytes

    def _evict_subtree(self, node: _Node[S, T]) -> None:
        """Drops a node and all that continue it."""
        below = [node]
        for each in below:
            below += each.children.values()
        for each in reversed(below):
            self._evict(each)

    def _touch(self, path: Sequence[_Node[S, T]]) -> None:
        """Marks nodes, in order from the first, as used now."""
        for node in reversed(path):
            self._lru.move_to_end(node)


def _path_to(node: _Root[S, T]) -> list[_Node[S, T]]:
    """A node and those that lead to it, from the first."""
    path = []
    while isinstance(node, _Node):
        path.append(node)
        node = node.parent
    return path[::-1]


def _common_length(a: array[int], b: array[int]) -> int:
    """How many items two runs have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
