"""The caches of mlx_lm's models: of one row, of a batch, and as pieces that can be kept.

A row's caches are a list, one for each layer. Those that hold a key and a value for
every token can be cut at any token. All others (sliding windows, recurrent states)
are only ever right at the very token they stand at, so they are kept and given back
whole.
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
from runner_server.mlx_backend.cache.slots import SlotCache
from runner_server.mlx_backend.upstream.names import KVCache, RotatingKVCache, make_prompt_cache

Caches = list[Any]
Pair = tuple[mx.array, mx.array]

Segment = list[Pair | None]
"""Keys and values of each layer that can be cut; None for a layer without attention, whose cache
stays empty."""

StateSnapshot = list[Any]

_MOVED_BYTES = 32 << 20
"""Memory of layers whose rows change place together. Each group is waited for."""


def merge(rows: Sequence[Caches], capacity: int) -> Caches:
    """Puts the caches of rows beside each other, to be decoded together.

    Args:
        rows: Of each row, those of its layers.
        capacity: Rows to make room for, if that is more.
    """
    return [
        SlotCache(layers, capacity) if _is_plain(layers[0]) else side_by_side(layers)
        for layers in zip(*rows, strict=True)
    ]


def extend(batch: Caches, rows: Sequence[Caches], capacity: int) -> None:
    """Adds rows to a batch, and makes room for so many in all if there is none."""
    for layer, added in zip(batch, zip(*rows, strict=True), strict=True):
        if isinstance(layer, SlotCache):
            layer.add(added, capacity)
        else:
            other = side_by_side(added)
            _level([layer, other])
            layer.extend(other)


def keep(batch: Caches, slots: Sequence[int]) -> None:
    """Leaves these rows in a batch, in this order; nothing is being computed from it."""
    slot_caches = [layer for layer in batch if isinstance(layer, SlotCache)]
    for layers in _grouped(slot_caches):
        moved = [layer.copies_to_move(slots) for layer in layers]
        mx.eval(moved)
        for layer, rows in zip(layers, moved, strict=True):
            layer.keep(slots, rows)
        if len(layers) < len(slot_caches):
            # The copies go before those of the next layers are made.
            del moved
            evaluate(layers)
    for layer in batch:
        if not isinstance(layer, SlotCache):
            layer.filter(list(slots))


def compact(batch: Caches) -> None:
    """Moves rows to memory that is no larger than they need, layer by layer."""
    for layer in batch:
        if isinstance(layer, SlotCache):
            layer.compact()
            evaluate([layer])


def _grouped(layers: Sequence[SlotCache]) -> Iterator[list[SlotCache]]:
    """Yields layers that are moved together: as many as bound the memory of their copies."""
    group: list[SlotCache] = []
    for layer in layers:
        if group and sum(each.nbytes for each in (*group, layer)) > _MOVED_BYTES:
            yield group
            group = []
        group.append(layer)
    if group:
        yield group


def extract(batch: Caches, slot: int) -> Caches:
    """Copies a row out of a batch."""
    return [_extracted(layer, slot) for layer in batch]


def _extracted(layer: Any, slot: int) -> Any:
    # mlx_lm's batched cache fails where the layer has no attention, so that nothing is in it.
    if not isinstance(layer, SlotCache) and getattr(layer, "keys", layer) is None:
        return KVCache()
    return layer.extract(slot)


def view(batch: Caches, slot: int) -> Caches:
    """A row of a batch, to be read before the batch changes; copied only where it must be."""
    return [
        layer.view(slot) if isinstance(layer, SlotCache) else _extracted(layer, slot)
        for layer in batch
    ]


def prefill(model: Module, rows: Sequence[Caches], chunks: Sequence[Sequence[int]]) -> list[Caches]:
    """Evaluates tokens of several rows together.

    Args:
        model: The evaluated model.
        rows: The caches of each; all as long, or there is one.
        chunks: The tokens of each.

    Returns:
        The caches of each, evaluated.
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
    """Computes what the caches are to hold; waits for it."""
    mx.eval([cache.state for cache in caches])


@dataclass(frozen=True)
class CachePieces:
    """Cuts the caches of one model into pieces and puts them together again.

    Attributes:
        new: Makes empty caches.
        cut_layers: For each layer, whether it can be cut at any token.
        can_pad: Whether rows of unequal length may be evaluated together: recurrent layers
            of several models take padding for text.
    """

    new: Callable[[], Caches]
    cut_layers: tuple[bool, ...]
    can_pad: bool

    @classmethod
    def of(cls, model: Module) -> CachePieces:
        """Those of a model."""
        caches = make_prompt_cache(model)
        return cls(
            new=lambda: make_prompt_cache(model),
            cut_layers=tuple(_is_plain(cache) for cache in caches),
            can_pad=all(type(cache) in (KVCache, RotatingKVCache) for cache in caches),
        )

    @property
    def needs_snapshot(self) -> bool:
        """Whether some layers cannot be cut."""
        return not all(self.cut_layers)

    def segment(self, caches: Caches, start: int, end: int) -> Segment:
        """Copies what the cuttable layers hold for the tokens from ``start`` to ``end``."""
        return self.cut(self._cuttable(caches), start, end)

    def snapshot(self, caches: Caches) -> StateSnapshot:
        """Copies the other layers."""
        pairs = zip(caches, self.cut_layers, strict=True)
        kept = [copy.deepcopy(cache) for cache, cut in pairs if not cut]
        for cache in kept:
            _compact(cache)
        evaluate(kept)
        return kept

    def cut(self, segment: Segment, start: int, end: int) -> Segment:
        """Copies a part of a segment; nothing of the whole stays alive by it."""
        parts = [pair and _cut_pair(pair, start, end) for pair in segment]
        mx.eval([pair for pair in parts if pair])
        return parts

    def restore(self, segments: Sequence[Segment], snapshot: StateSnapshot) -> Caches:
        """Makes caches that hold these segments in order, and the snapshot."""
        layers = iter(zip(*segments, strict=True))
        others = iter(snapshot)
        return [
            _joined(next(layers)) if cut else copy.deepcopy(next(others)) for cut in self.cut_layers
        ]

    def token_bytes(self, caches: Caches) -> int:
        """Bytes of one token in the layers that can be cut."""
        pairs = filter(None, self._cuttable(caches))
        return sum((keys.nbytes + values.nbytes) // keys.shape[2] for keys, values in pairs)

    def segment_bytes(self, segment: Segment) -> int:
        """Bytes it holds."""
        return sum(keys.nbytes + values.nbytes for keys, values in filter(None, segment))

    def snapshot_bytes(self, snapshot: StateSnapshot) -> int:
        """Bytes it holds."""
        return sum(int(cache.nbytes) for cache in snapshot)

    def is_finite(self, segment: Segment, snapshot: StateSnapshot | None) -> bool:
        """Whether all that pieces hold are numbers."""
        states = [cache.state for cache in snapshot or []]
        held = [part for _, part in cast("list[tuple[str, Any]]", tree_flatten([segment, states]))]
        numbers = [part for part in held if _is_floating(part)]
        return all(mx.all(mx.isfinite(part)).item() for part in numbers)

    def _cuttable(self, caches: Caches) -> Segment:
        pairs = zip(caches, self.cut_layers, strict=True)
        return [
            None if cache.keys is None else (cache.keys, cache.values)
            for cache, cut in pairs
            if cut
        ]


def _cut_pair(pair: Pair, start: int, end: int) -> Pair:
    keys, values = pair
    return copied(keys[..., start:end, :]), copied(values[..., start:end, :])


def _is_floating(value: Any) -> bool:
    return isinstance(value, mx.array) and bool(mx.issubdtype(value.dtype, mx.floating))


def _compact(cache: Any) -> None:
    """Puts copies in place of its arrays, which may be parts of larger ones."""
    if type(cache).state.fset:
        cache.state = tree_map(_copied, cache.state)
    else:
        # Caches that a type brings along; what they hold are attributes.
        vars(cache).update({name: _copied(value) for name, value in vars(cache).items()})


def _copied(value: Any) -> Any:
    return copied(value) if isinstance(value, mx.array) else value


def _is_plain(cache: Any) -> bool:
    """Whether it holds a key and a value for every token, and nothing else."""
    return type(cache) is KVCache


def side_by_side(layers: Sequence[Any]) -> Any:
    """The caches of rows beside each other as mlx_lm has them; copied when a row comes or goes."""
    _level(layers)
    return layers[0].merge(list(layers))


def _level(caches: Sequence[Any]) -> None:
    """Gives states that are the last few tokens (n-grams) one length: zeros before the first.

    mlx_lm would spread the shorter one over all places. The model takes zeros for missing tokens.
    """
    for index in range(min(len(getattr(cache, "cache", ())) for cache in caches)):
        tables = [cache for cache in caches if cache[index] is not None and cache[index].ndim == 2]
        longest = max((cache[index].shape[1] for cache in tables), default=0)
        for cache in tables:
            missing = longest - cache[index].shape[1]
            if missing:
                cache[index] = mx.pad(cache[index], [(0, 0), (missing, 0)])


def _joined(parts: Sequence[Pair | None]) -> Any:
    cache = KVCache()
    pairs = [pair for pair in parts if pair]
    if pairs:
        keys, values = (mx.concatenate(list(side), axis=2) for side in zip(*pairs, strict=True))
        cache.state = (keys, values, keys.shape[2])
    return cache
