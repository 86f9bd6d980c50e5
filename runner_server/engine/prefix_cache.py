"""Prefix cache: a radix tree of prefilled prompts under a byte budget.

Each node represents a run of tokens and holds the segment of the model's KV caches for them.
Prompts with a common prefix share nodes. Segments are opaque to the tree: :class:`SegmentOps` cuts
and measures them.

Each salt has a tree of its own, so that requests with different salts share nothing but the budget.

Nodes are evicted least recently used first, and never before their descendants. A prefix that many
prompts share, such as a system prompt, therefore stays longest.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

S = TypeVar("S")
"""Segment: part of the KV caches, for a run of tokens. Can be cut."""

T = TypeVar("T")
"""Snapshot: the rest of the caches' state, after the last token of a run. Cannot be cut."""

T_contra = TypeVar("T_contra", contravariant=True)


class SegmentOps(Protocol[S, T_contra]):
    """Operations on segments and snapshots."""

    @property
    def needs_snapshot(self) -> bool:
        """True if a prefix can be reused only up to a snapshot."""
        ...

    def cut(self, segment: S, start: int, end: int) -> S:
        """Copy a part of a segment."""
        ...

    def segment_bytes(self, segment: S) -> int:
        """Return the bytes of a segment."""
        ...

    def snapshot_bytes(self, snapshot: T_contra) -> int:
        """Return the bytes of a snapshot."""
        ...


@dataclass(frozen=True)
class Match:
    """Length of the longest cached prefix of a prompt.

    Attributes:
        usable: Number of leading tokens whose caches can be reused.
        common: Number of leading tokens in common with a cached prompt, reusable or not.
    """

    usable: int
    common: int


@dataclass
class CacheUsage:
    """Byte counters that do not keep the cache alive.

    Attributes:
        limit_bytes: The byte budget.
        nbytes: Bytes in use.
    """

    limit_bytes: int
    nbytes: int = 0


class _Root(Generic[S, T]):
    """Root of the tree of a salt."""

    def __init__(self, salt: str) -> None:
        self.salt = salt
        self.children: dict[int, _Node[S, T]] = {}


class _Node(_Root[S, T]):
    """A run of tokens that continues the path from the root to its parent."""

    def __init__(self, tokens: array[int], parent: _Root[S, T], segment: S) -> None:
        super().__init__(parent.salt)
        self.tokens = tokens
        self.parent = parent
        self.segment = segment
        self.snapshot: T | None = None
        self.nbytes = 0


class PrefixCache(Generic[S, T]):
    """Radix trees of prefilled prompts, evicted least recently used first.

    Args:
        ops: Operations on segments and snapshots.
        budget_bytes: The byte budget; 0 disables the cache.

    Attributes:
        usage: Byte counters, which may outlive the cache.
    """

    def __init__(self, ops: SegmentOps[S, T], budget_bytes: int) -> None:
        self._ops = ops
        # The trees that are not empty, by salt.
        self._roots: dict[str, _Root[S, T]] = {}
        # Least recently used first. A node is always touched after the nodes below it.
        self._lru: OrderedDict[_Node[S, T], None] = OrderedDict()
        self.usage = CacheUsage(budget_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return self.usage.nbytes

    def __len__(self) -> int:
        return len(self._lru)

    @property
    def is_enabled(self) -> bool:
        """True unless the budget is 0."""
        return self.usage.limit_bytes > 0

    def limit(self, limit_bytes: int) -> None:
        """Change the byte budget, evicting nodes to meet the new one."""
        self.usage.limit_bytes = limit_bytes
        while self.nbytes > limit_bytes:
            self._evict(next(iter(self._lru)))

    def match(self, tokens: Sequence[int], salt: str = "") -> Match:
        """Return the length of the cached prefix of a prompt without touching its nodes."""
        if not self._lru:
            return Match(0, 0)
        path = self._walk(array("i", tokens), salt)
        common = sum(length for _, length in path)
        if not self._ops.needs_snapshot:
            return Match(common, common)
        return Match(self._deepest_snapshot(path)[1], common)

    def lookup(self, tokens: Sequence[int], salt: str = "") -> tuple[int, list[S], T | None]:
        """Return the reusable prefix of a prompt, and touch its nodes.

        Returns:
            The number of tokens, their segments in order, and the snapshot after them.
        """
        path = self._walk(array("i", tokens), salt)
        snapshot: T | None = None
        if self._ops.needs_snapshot:
            count, _ = self._deepest_snapshot(path)
            path = path[:count]
            snapshot = path[-1][0].snapshot if path else None
        self._touch([node for node, _ in path])
        segments = [self._segment_part(node, length) for node, length in path]
        return sum(length for _, length in path), segments, snapshot

    def peek(self, tokens: Sequence[int], start: int, salt: str = "") -> list[S] | None:
        """Return the segments of a prefix from a token on, without touching its nodes.

        Args:
            tokens: The prefix.
            start: Number of leading tokens to leave out.
            salt: The tree to look in.

        Returns:
            The segments in order; None if not all of the prefix is cached.
        """
        segments = []
        at = 0
        for node, length in self._walk(array("i", tokens), salt):
            first = max(start - at, 0)
            if first < length:
                is_whole = first == 0 and length == len(node.tokens)
                segments.append(
                    node.segment if is_whole else self._ops.cut(node.segment, first, length)
                )
            at += length
        return segments if at == len(tokens) else None

    def insert(
        self,
        tokens: Sequence[int],
        segment: Callable[[int, int], S],
        snapshot: Callable[[], T] | None = None,
        *,
        salt: str = "",
        token_bytes: int = 0,
    ) -> None:
        """Insert a prefilled prefix, within the byte budget.

        Args:
            tokens: The prefix.
            segment: Copies the segment of a range of tokens; called only for tokens that are
                not in the tree.
            snapshot: Copies the snapshot after the last token.
            salt: The tree to insert into.
            token_bytes: Bytes of one token's segment; 0 if unknown. If given, no more tokens are
                copied than fit the budget.
        """
        run = array("i", tokens)
        path = self._walk(run, salt)
        cached = sum(length for _, length in path)
        if token_bytes and (fitting := self.usage.limit_bytes // token_bytes) < len(run):
            run, snapshot = run[: max(cached, fitting)], None
        node = self._node_ending(path, salt)
        self._touch(_path_to(node))
        if cached < len(run):
            # Evict before copying, so that old and new segments never exist together.
            if not self._evict_to_fit(token_bytes * (len(run) - cached), node):
                return
            grown = self._append(node, run[cached:], segment(cached, len(run)))
            if grown is None:
                return
            node = grown
        if snapshot and isinstance(node, _Node) and node.snapshot is None:
            self._attach(node, snapshot())

    def forget(
        self, tokens: Sequence[int], is_sound: Callable[[S, T | None], bool], salt: str = ""
    ) -> None:
        """Evict the nodes of a failed prompt, and unsound nodes with their subtrees.

        Args:
            tokens: The tokens of the failed prompt that were prefilled.
            is_sound: Returns whether a segment and its snapshot are valid. Sound nodes that other
                prompts share stay.
            salt: The tree with the prompt.
        """
        path = self._walk(array("i", tokens), salt)
        for node, _ in path:
            if not is_sound(node.segment, node.snapshot):
                self._evict_subtree(node)
                break
        for node, length in reversed(path):
            is_own = length == len(node.tokens) and not node.children
            if is_own and node in self._lru:
                self._evict(node)

    # -- walking -----------------------------------------------------------------

    def _walk(self, tokens: array[int], salt: str) -> list[tuple[_Node[S, T], int]]:
        """Return the path of a prompt: nodes, each with its number of matching tokens."""
        path = []
        node = self._root_of(salt)
        at = 0
        while at < len(tokens) and (child := node.children.get(tokens[at])):
            length = _common_length(child.tokens, tokens[at : at + len(child.tokens)])
            path.append((child, length))
            at += length
            if length < len(child.tokens):
                break
            node = child
        return path

    def _root_of(self, salt: str) -> _Root[S, T]:
        """Return the root of a tree, a new one if the tree is empty."""
        return self._roots.get(salt) or _Root(salt)

    def _deepest_snapshot(self, path: list[tuple[_Node[S, T], int]]) -> tuple[int, int]:
        """Return the number of nodes and of tokens up to the last snapshot on a path."""
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

    def _node_ending(self, path: list[tuple[_Node[S, T], int]], salt: str) -> _Root[S, T]:
        """Return the node at the end of a path, splitting the last node if necessary."""
        if not path:
            return self._root_of(salt)
        node, length = path[-1]
        return node if length == len(node.tokens) else self._split(node, length)

    # -- changing ----------------------------------------------------------------

    def _split(self, node: _Node[S, T], at: int) -> _Node[S, T]:
        """Split a node; return the upper half."""
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
        """Add a child node; return None if the budget does not allow it in addition to its path."""
        if not self._evict_to_fit(self._ops.segment_bytes(segment), parent):
            return None
        node = _Node[S, T](tokens, parent, segment)
        if not isinstance(parent, _Node):
            # Not earlier, because making room may have removed the last node of the tree.
            self._roots[parent.salt] = parent
        parent.children[tokens[0]] = node
        # Touched before its ancestors, so that it is evicted before them.
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
        """Evict nodes off a path until ``needed`` bytes fit; return False if they cannot."""
        if sum(node.nbytes for node in _path_to(keep)) + needed > self.usage.limit_bytes:
            return False
        while self.nbytes + needed > self.usage.limit_bytes:
            # Never a node of the path, whose nodes were touched last.
            self._evict(next(iter(self._lru)))
        return True

    def _evict(self, node: _Node[S, T]) -> None:
        parent = node.parent
        del parent.children[node.tokens[0]]
        if not (parent.children or isinstance(parent, _Node)):
            del self._roots[parent.salt]
        del self._lru[node]
        self.usage.nbytes -= node.nbytes

    def _evict_subtree(self, node: _Node[S, T]) -> None:
        """Evict a node and its descendants."""
        below = [node]
        for each in below:
            below += each.children.values()
        for each in reversed(below):
            self._evict(each)

    def _touch(self, path: Sequence[_Node[S, T]]) -> None:
        """Mark the nodes of a path as just used, from the last node up to the first."""
        for node in reversed(path):
            self._lru.move_to_end(node)


def _path_to(node: _Root[S, T]) -> list[_Node[S, T]]:
    """Return the path from the root to a node."""
    path = []
    while isinstance(node, _Node):
        path.append(node)
        node = node.parent
    return path[::-1]


def _common_length(a: array[int], b: array[int]) -> int:
    """Return the length of the common prefix of two runs."""
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
