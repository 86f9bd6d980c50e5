"""The caches of mlx_lm's models: of one row, of a batch, and as pieces for the prefix cache.

A row's caches are a list with one cache per layer. A cache with a key and a value for every token
can be cut at any token. Any other cache (sliding window, recurrent state) is valid only after the
latest token, so the prefix cache stores and restores it whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten, tree_map

from runner_server.mlx_backend.arrays import copied
from runner_server.mlx_backend.cache.quantized import Parts, QuantizedCache, fill, parts_of
from runner_server.mlx_backend.cache.slots import QuantizedSlotCache, SlotCache
from runner_server.mlx_backend.upstream.names import KVCache, RotatingKVCache, make_prompt_cache

Caches = list[Any]

Segment = list[Parts | None]
"""Keys and values of each layer that can be cut; None for a layer without attention, whose cache
stays empty."""

StateSnapshot = list[Any]

_MOVED_BYTES = 32 << 20
"""Memory of the layers whose rows move in one evaluation. It bounds the memory of the copies."""


def merge(rows: Sequence[Caches], capacity: int) -> Caches:
    """Merge the caches of rows into a batch.

    Args:
        rows: The caches of each row.
        capacity: Number of slots to allocate, if larger than the number of rows.
    """
    return [_merged(layers, capacity) for layers in zip(*rows, strict=True)]


def _merged(layers: Sequence[Any], capacity: int) -> Any:
    if type(layers[0]) is KVCache:
        return SlotCache(layers, capacity)
    if type(layers[0]) is QuantizedCache:
        return QuantizedSlotCache(layers, capacity)
    return side_by_side(layers)


def extend(batch: Caches, rows: Sequence[Caches], capacity: int) -> None:
    """Add rows to a batch. If slots run out, reallocate memory with ``capacity`` slots."""
    for layer, added in zip(batch, zip(*rows, strict=True), strict=True):
        if isinstance(layer, SlotCache):
            layer.add(added, capacity)
        else:
            other = side_by_side(added)
            _level([layer, other])
            layer.extend(other)


def keep(batch: Caches, slots: Sequence[int]) -> None:
    """Keep the rows in ``slots``, in this order, and remove the others.

    Wait first for any pending computation that reads the batch. Otherwise MLX would copy the whole
    memory instead of writing in place.
    """
    slot_caches = [layer for layer in batch if isinstance(layer, SlotCache)]
    for layers in _grouped(slot_caches):
        moved = [layer.copies_to_move(slots) for layer in layers]
        mx.eval(moved)
        for layer, rows in zip(layers, moved, strict=True):
            layer.keep(slots, rows)
        if len(layers) < len(slot_caches):
            # Free these copies before making those of the next layers.
            del moved
            evaluate(layers)
    for layer in batch:
        if not isinstance(layer, SlotCache):
            layer.filter(list(slots))


def compact(batch: Caches) -> None:
    """Move the rows to the smallest memory that fits them, one layer at a time."""
    for layer in batch:
        if isinstance(layer, SlotCache):
            layer.compact()
            evaluate([layer])


def _grouped(layers: Sequence[SlotCache]) -> Iterator[list[SlotCache]]:
    """Yield groups of layers to move together, which bound the memory of the copies."""
    group: list[SlotCache] = []
    for layer in layers:
        if group and sum(each.nbytes for each in (*group, layer)) > _MOVED_BYTES:
            yield group
            group = []
        group.append(layer)
    if group:
        yield group


def cut_back(row: Caches, count: int) -> None:
    """Remove the last ``count`` tokens from the caches of a row, which must all be plain."""
    for layer in row:
        layer.trim(count)


def extract(batch: Caches, slot: int) -> Caches:
    """Copy a row out of a batch."""
    return [_extracted(layer, slot) for layer in batch]


def _extracted(layer: Any, slot: int) -> Any:
    # mlx_lm's batched cache cannot extract from a layer without attention, which is empty.
    is_own = isinstance(layer, SlotCache | QuantizedCache)
    if not is_own and getattr(layer, "keys", layer) is None:
        return KVCache()
    return layer.extract(slot)


def view(batch: Caches, slot: int) -> Caches:
    """Return a row of a batch, valid until the batch changes. Copies only if necessary."""
    return [
        layer.view(slot) if isinstance(layer, SlotCache) else _extracted(layer, slot)
        for layer in batch
    ]


def prefill(model: Module, rows: Sequence[Caches], chunks: Sequence[Sequence[int]]) -> list[Caches]:
    """Run the model on one chunk of each row's prompt, in one call.

    Args:
        model: The model, with its weights in memory.
        rows: The caches of each row. If there are several, all must have the same length.
        chunks: The next tokens of each row. Shorter chunks are padded on the right.

    Returns:
        The caches of each row, evaluated.
    """
    if len(rows) == 1:
        model(mx.array([list(chunks[0])]), cache=rows[0])
        evaluate(rows[0])
        return list(rows)
    lengths = [len(chunk) for chunk in chunks]
    padding = [max(lengths) - length for length in lengths]
    tokens = mx.array([[*chunk, *[0] * pad] for chunk, pad in zip(chunks, padding, strict=True)])
    batch = [side_by_side(layers) for layers in zip(*rows, strict=True)]
    if any(padding):
        for cache in batch:
            cache.prepare(lengths=lengths, right_padding=padding)
    model(tokens, cache=batch)
    if any(padding):
        for cache in batch:
            cache.finalize()
    evaluated = [extract(batch, slot) for slot in range(len(rows))]
    for caches in evaluated:
        evaluate(caches)
    return evaluated


def evaluate(caches: Caches) -> None:
    """Evaluate the caches' arrays, and wait for the result."""
    mx.eval([cache.state for cache in caches])


@dataclass(frozen=True)
class CachePieces:
    """Cuts the caches of a model into pieces for the prefix cache, and joins pieces again.

    For example, a model with an attention layer and a sliding-window layer has ``cut_layers ==
    (True, False)``. Once 100 tokens of a prompt have been prefilled:

    1. ``segment(caches, 0, 60)`` and ``segment(caches, 60, 100)`` copy the attention layer's keys
       and values of those tokens. The prefix cache stores a segment per node of its radix tree.
    2. ``snapshot(caches)`` copies the window layer as it is after token 100.
    3. For a later prompt with the same first 100 tokens, ``restore([first, second], snapshot)``
       joins the segments and adds the window layer. Prefill continues at token 100.
    4. A prompt that shares only the first 60 tokens can reuse nothing, unless a snapshot was taken
       there: a window that has reached token 100 cannot be cut back to token 60.

    Attributes:
        new: Creates empty caches for a row.
        cut_layers: For each layer, whether its cache can be cut at any token.
        can_pad: Whether chunks of unequal length may be prefilled together. Not with recurrent
            layers: those of several models process padding as if it were text.
    """

    new: Callable[[], Caches]
    cut_layers: tuple[bool, ...]
    can_pad: bool

    @classmethod
    def of(cls, model: Module) -> CachePieces:
        """Return an instance for a model's caches."""
        caches = make_prompt_cache(model)
        return cls(
            new=lambda: make_prompt_cache(model),
            cut_layers=tuple(_can_be_cut(cache) for cache in caches),
            can_pad=all(_can_be_cut(c) or type(c) is RotatingKVCache for c in caches),
        )

    @property
    def needs_snapshot(self) -> bool:
        """True if some layers cannot be cut, so that a prefix needs a snapshot."""
        return not all(self.cut_layers)

    @property
    def uncuttable(self) -> str:
        """Names of the classes of caches that cannot be cut; empty if there are none."""
        kinds = {
            type(c).__name__ for c, cut in zip(self.new(), self.cut_layers, strict=True) if not cut
        }
        return ", ".join(sorted(kinds))

    def segment(self, caches: Caches, start: int, end: int) -> Segment:
        """Copy keys and values from token ``start`` to ``end``, in the layers that can be cut."""
        return self.cut(self._cuttable(caches), start, end)

    def snapshot(self, caches: Caches) -> StateSnapshot:
        """Copy the caches of the layers that cannot be cut."""
        pairs = zip(caches, self.cut_layers, strict=True)
        kept = [copy.deepcopy(cache) for cache, cut in pairs if not cut]
        for cache in kept:
            _compact(cache)
        evaluate(kept)
        return kept

    def cut(self, segment: Segment, start: int, end: int) -> Segment:
        """Copy a part of a segment; the copy does not keep the whole segment alive."""
        cut = [parts and _cut(parts, start, end) for parts in segment]
        mx.eval([parts for parts in cut if parts])
        return cut

    def restore(self, segments: Sequence[Segment], snapshot: StateSnapshot) -> Caches:
        """Join consecutive segments and a snapshot into the caches of a row."""
        layers = iter(zip(*segments, strict=True))
        others = iter(snapshot)
        return [
            _joined(cache, next(layers)) if cut else copy.deepcopy(next(others))
            for cache, cut in zip(self.new(), self.cut_layers, strict=True)
        ]

    def token_bytes(self, caches: Caches) -> int:
        """Return the bytes of one token in the layers that can be cut."""
        layers = filter(None, self._cuttable(caches))
        return sum(part.nbytes // part.shape[2] for parts in layers for part in parts)

    def segment_bytes(self, segment: Segment) -> int:
        """Return the bytes of a segment."""
        return sum(part.nbytes for parts in filter(None, segment) for part in parts)

    def snapshot_bytes(self, snapshot: StateSnapshot) -> int:
        """Return the bytes of a snapshot."""
        return sum(int(cache.nbytes) for cache in snapshot)

    def is_finite(self, segment: Segment, snapshot: StateSnapshot | None) -> bool:
        """Return whether a segment and a snapshot contain only finite numbers."""
        states = [cache.state for cache in snapshot or []]
        held = [part for _, part in cast("list[tuple[str, Any]]", tree_flatten([segment, states]))]
        numbers = [part for part in held if _is_floating(part)]
        return all(mx.all(mx.isfinite(part)).item() for part in numbers)

    def _cuttable(self, caches: Caches) -> Segment:
        pairs = zip(caches, self.cut_layers, strict=True)
        return [parts_of(cache) or None for cache, cut in pairs if cut]


def _cut(parts: Parts, start: int, end: int) -> Parts:
    return tuple(copied(part[..., start:end, :]) for part in parts)


def _is_floating(value: Any) -> bool:
    return isinstance(value, mx.array) and bool(mx.issubdtype(value.dtype, mx.floating))


def _compact(cache: Any) -> None:
    """Replace a cache's arrays, which may be views of larger ones, with copies."""
    if type(cache).state.fset:
        cache.state = tree_map(_copied, cache.state)
    else:
        # A class of the model's own module, with arrays as attributes.
        vars(cache).update({name: _copied(value) for name, value in vars(cache).items()})


def _copied(value: Any) -> Any:
    return copied(value) if isinstance(value, mx.array) else value


def _can_be_cut(cache: Any) -> bool:
    """Return whether a cache has a key and a value for every token, and no other state."""
    return type(cache) in (KVCache, QuantizedCache)


def side_by_side(layers: Sequence[Any]) -> Any:
    """Merge the rows' caches of one layer into mlx_lm's batched cache."""
    _level(layers)
    return layers[0].merge(list(layers))


def _level(caches: Sequence[Any]) -> None:
    """Pad states that hold the last few tokens (n-grams) to equal lengths, with zeros on the left.

    Otherwise mlx_lm would broadcast the shorter ones. Models treat zeros as missing tokens.
    """
    for index in range(min(len(getattr(cache, "cache", ())) for cache in caches)):
        tables = [cache for cache in caches if cache[index] is not None and cache[index].ndim == 2]
        longest = max((cache[index].shape[1] for cache in tables), default=0)
        for cache in tables:
            missing = longest - cache[index].shape[1]
            if missing:
                cache[index] = mx.pad(cache[index], [(0, 0), (missing, 0)])


def _joined(cache: Any, segments: Sequence[Parts | None]) -> Any:
    """Fill an empty cache with consecutive segments of a layer."""
    if held := [parts for parts in segments if parts]:
        parts = tuple(mx.concatenate(list(own), axis=2) for own in zip(*held, strict=True))
        fill(cache, parts, parts[0].shape[2])
    return cache
