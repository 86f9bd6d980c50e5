"""Blocks of the prefix cache on disk: keys and values as bytes, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module

from runner_server.engine.prefix_disk import BLOCK_TOKENS
from runner_server.mlx_backend.cache.row_caches import CachePieces, Segment


@dataclass(frozen=True)
class _Part:
    """An array of a layer: its keys or its values, or a part of them if they are quantized.

    Attributes:
        heads: Number of heads.
        width: Numbers of a head, for each token.
        dtype: Their dtype.
    """

    heads: int
    width: int
    dtype: mx.Dtype

    @classmethod
    def of(cls, value: mx.array) -> _Part:
        return cls(value.shape[1], value.shape[3], value.dtype)

    @property
    def nbytes(self) -> int:
        return self.heads * BLOCK_TOKENS * self.width * self.dtype.size


class BlockCodec:
    """Turns segments of a model into bytes, and back; see ``BlockOps``.

    The bytes are those of the arrays, layer by layer. Sizes and types are the model's, so that
    nothing in a file says how long a part is, or of which type.

    Args:
        model: The model, with its weights in memory.
        pieces: Cuts the model's caches, all of whose layers can be cut.
    """

    def __init__(self, model: Module, pieces: CachePieces) -> None:
        caches = pieces.new()
        model(mx.array([[0]]), cache=caches)
        segment = pieces.segment(caches, 0, 1)
        self._pieces = pieces
        self._layers = [None if parts is None else tuple(map(_Part.of, parts)) for parts in segment]

    @property
    def layout(self) -> str:
        """Description of the parts, the same for all models with the same layout."""
        return " ".join(
            "-" if layer is None else "/".join(f"{p.heads}x{p.width}:{p.dtype}" for p in layer)
            for layer in self._layers
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return sum(part.nbytes for part in self._parts())

    def cut(self, segment: Segment, start: int, end: int) -> Segment:
        """Copy a part of a segment."""
        return self._pieces.cut(segment, start, end)

    def encode(self, segments: Sequence[Segment]) -> bytes | None:
        """Return the bytes of consecutive segments; None if not all numbers are finite."""
        arrays = [
            mx.contiguous(mx.concatenate(list(side), axis=2))
            for layer in zip(*segments, strict=True)
            if layer[0] is not None
            for side in zip(*[parts for parts in layer if parts], strict=True)
        ]
        # The maximum is not a number if any is not, in one pass over the numbers.
        most = mx.stack([mx.max(mx.abs(value)).astype(mx.float32) for value in arrays])
        is_finite = mx.all(mx.isfinite(most))
        mx.eval(arrays, is_finite)
        if not is_finite.item():
            return None
        # MLX's types do not tell that an array is a buffer, and can be made of one.
        return b"".join([memoryview(cast("Any", value)).cast("B") for value in arrays])

    def decode(self, payload: bytearray) -> Segment:
        """Return the segment with these bytes, which are :attr:`block_bytes` long."""
        # One copy of all bytes, which the arrays of the layers share: they are freed together.
        whole = mx.array(cast("Any", memoryview(payload)))
        arrays = self._arrays(whole)
        segment = [
            None if layer is None else tuple(next(arrays) for _ in layer) for layer in self._layers
        ]
        mx.eval([layer for layer in segment if layer])
        return segment

    def _arrays(self, whole: mx.array) -> Iterator[mx.array]:
        at = 0
        for part in self._parts():
            numbers = whole[at : at + part.nbytes].view(part.dtype)
            yield numbers.reshape(1, part.heads, BLOCK_TOKENS, part.width)
            at += part.nbytes

    def _parts(self) -> Iterator[_Part]:
        return (part for layer in self._layers if layer for part in layer)
