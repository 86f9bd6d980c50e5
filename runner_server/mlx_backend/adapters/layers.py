"""Layers with several adapters, which compute what mlx_lm's layers compute with one.

Rows with the same adapter get the two small products of ``mlx_lm.tuner.lora``. For rows with
different ones, the matrices of all adapters of a layer are side by side: one product with the first
matrices, of which each row keeps the columns of its adapter, and one with the second. Zeros add
nothing, so a row without an adapter keeps the exact output of the layer. The weights of the model
are read once for all rows, not once for each adapter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import QuantizedLinear

from runner_server.mlx_backend.adapters.selection import Selection
from runner_server.mlx_backend.upstream.names import SwitchGLU, SwitchMLP

_NORM_BLOCK_BYTES = 4 << 20
"""Bytes of a dense weight whose norms are computed at once."""


@dataclass(frozen=True)
class LayerAdapter:
    """The tensors of one adapter for one layer.

    Attributes:
        number: Number of the adapter.
        lora_a: First matrix: inputs x rank, or experts x rank x inputs.
        lora_b: Second matrix: rank x outputs, or experts x outputs x rank.
        scale: Factor on the product.
        magnitude: Norm of each output's weights (DoRA); None for LoRA.
    """

    number: int
    lora_a: mx.array
    lora_b: mx.array
    scale: float
    magnitude: mx.array | None = None


@dataclass(frozen=True)
class _Part:
    """Place of an adapter in the joined matrices of a layer.

    Attributes:
        number: Number of the adapter.
        start: Its first column in the ranks of all adapters.
        end: The column after its last one.
        scale: Factor on its product.
        ratio: Index of its ratios among those of the layer; None without magnitudes.
    """

    number: int
    start: int
    end: int
    scale: float
    ratio: int | None


class _Layout:
    """Places of a layer's adapters. Not a part of the module's tree of parameters."""

    def __init__(self, adapters: Sequence[LayerAdapter], selection: Selection) -> None:
        self.parts = _parts(adapters)
        self._by_number = {part.number: part for part in self.parts}
        self._selection = selection

    def alone(self) -> _Part | None:
        """Return the part of the adapter that all rows have; None if this layer has none of it."""
        return self._by_number.get(self._selection.adapter)

    def is_used(self, count: int) -> bool:
        """Return whether one of ``count`` rows has an adapter of this layer."""
        if self._selection.is_any:
            return True
        found = self._selection.derived(("used", self.parts), lambda: self._parts_of_rows(count))
        return any(cast("list[_Part | None]", found))

    def columns(self, count: int) -> tuple[mx.array, mx.array]:
        """Return the columns that each row keeps (rows x 1 x ranks), and the scale of each row."""
        found = self._selection.derived(("columns", self.parts), lambda: self._columns(count))
        return cast("tuple[mx.array, mx.array]", found)

    def ratios(self, count: int) -> tuple[mx.array, mx.array]:
        """Return which rows have magnitudes (rows x 1 x 1), and the index of each; 0 for others."""
        found = self._selection.derived(("ratios", self.parts), lambda: self._ratios(count))
        return cast("tuple[mx.array, mx.array]", found)

    def _parts_of_rows(self, count: int) -> list[_Part | None]:
        return [self._by_number.get(self._selection.number_of(row)) for row in range(count)]

    def _columns(self, count: int) -> tuple[mx.array, mx.array]:
        parts, ranks = self._parts_of_rows(count), range(self.parts[-1].end)
        kept = [[part is not None and part.start <= i < part.end for i in ranks] for part in parts]
        scales = [part.scale if part else 0.0 for part in parts]
        return mx.array(kept)[:, None], mx.array(scales, dtype=mx.float32)[:, None, None]

    def _ratios(self, count: int) -> tuple[mx.array, mx.array]:
        found = [part.ratio if part else None for part in self._parts_of_rows(count)]
        is_scaled = mx.array([each is not None for each in found])
        return is_scaled[:, None, None], mx.array([each or 0 for each in found])


class AdaptedLinear(Module):
    """A linear layer, quantized or not, with adapters.

    Args:
        linear: The layer.
        adapters: Their tensors.
        selection: The adapter of each row.
    """

    def __init__(
        self, linear: Module, adapters: Sequence[LayerAdapter], selection: Selection
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.linear = linear
        # The first matrices transposed, so that the rows of one adapter are contiguous in both.
        self.lora_a = _joined([each.lora_a.T for each in adapters])
        self.lora_b = _joined([each.lora_b for each in adapters])
        ratios = [_ratio(linear, each) for each in adapters if each.magnitude is not None]
        if ratios:
            self.ratios = mx.stack(ratios)
        self._layout = _Layout(adapters, selection)
        self._selection = selection

    def __call__(self, x: mx.array) -> mx.array:
        """Return the output of each row with its adapter."""
        if self._selection.is_mixed:
            return self._together(x)
        part = self._layout.alone()
        if part is None:
            return cast("mx.array", self.linear(x))
        own = slice(part.start, part.end)
        z = (x @ self.lora_a[own].T) @ self.lora_b[own]
        added = (part.scale * z).astype(x.dtype)
        if part.ratio is None:
            return cast("mx.array", self.linear(x)) + added
        return self._rescaled(x, added, self.ratios[part.ratio])

    def _together(self, x: mx.array) -> mx.array:
        """Return the output of rows with different adapters."""
        count = self._selection.count(x)
        # In traces of some models, experts get no tokens, or each token by itself.
        if count == 0 or not self._layout.is_used(count):
            return cast("mx.array", self.linear(x))
        shape = x.shape[:-1]
        # Some models pass the tokens of all rows in one dimension.
        x = x.reshape(count, -1, x.shape[-1])
        kept, scales = self._layout.columns(count)
        low = x @ self.lora_a.T
        # Not multiplied by 0: a number of another row's adapter may be infinite.
        z = mx.where(kept, low, mx.zeros((), dtype=low.dtype)) @ self.lora_b
        added = (scales * z).astype(x.dtype)
        out = cast("mx.array", self.linear(x)) + added
        if "ratios" in self:
            is_scaled, indices = self._layout.ratios(count)
            scaled = self._rescaled(x, added, self.ratios[indices][:, None])
            out = mx.where(is_scaled, scaled, out)
        return out.reshape(*shape, -1)

    def _rescaled(self, x: mx.array, added: mx.array, ratio: mx.array) -> mx.array:
        out = ratio.astype(x.dtype) * (_without_bias(self.linear, x) + added)
        return out + self.linear["bias"] if "bias" in self.linear else out


class AdaptedSwitchLinear(Module):
    """A layer of experts with adapters. All rows of a call have the same one.

    :func:`split_by_adapter` makes such calls of one with different adapters.

    Args:
        linear: The layer.
        adapters: Their tensors.
        selection: The adapter of the rows.
    """

    def __init__(
        self, linear: Module, adapters: Sequence[LayerAdapter], selection: Selection
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.linear = linear
        self.lora_a = [each.lora_a for each in adapters]
        self.lora_b = [each.lora_b for each in adapters]
        self._layout = _Layout(adapters, selection)
        self._selection = selection

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Return the output of the experts ``indices`` of each token."""
        if self._selection.rows is not None:
            raise RuntimeError("rows with different adapters reached a layer of experts")
        y: mx.array = self.linear(x, indices, sorted_indices=sorted_indices)
        part = self._layout.parts[0] if self._selection.is_any else self._layout.alone()
        if part is None:
            return y
        index = self._layout.parts.index(part)
        z = x
        for matrices in (self.lora_a, self.lora_b):
            z = mx.gather_mm(
                z,
                matrices[index].swapaxes(-1, -2),
                rhs_indices=indices,
                sorted_indices=sorted_indices,
            )
        return y + (part.scale * z).astype(x.dtype)


class _SplitByAdapter:
    """Computes the rows of each adapter by themselves.

    A block of experts sorts its tokens by expert, so that its layers cannot tell whose tokens they
    get.
    """

    _selection: Selection

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        compute: Callable[[mx.array, mx.array], mx.array] = cast("Any", super()).__call__
        selection = self._selection
        if selection.is_any:
            out = compute(x, indices)
            return mx.concatenate([out])[mx.arange(out.shape[0])]
        if selection.rows is None:
            return compute(x, indices)
        count, groups = selection.count(x), selection.groups()
        tokens = x.reshape(count, -1, x.shape[-1])
        chosen = indices.reshape(count, -1, indices.shape[-1])
        parts = []
        for number, rows in groups.rows.items():
            with selection.only(number):
                parts.append(compute(tokens[rows], chosen[rows]))
        return mx.concatenate(parts)[groups.order].reshape(*indices.shape, -1)


class _SplitSwitchGLU(_SplitByAdapter, SwitchGLU):  # type: ignore[misc]
    """Block of gated experts with adapters."""


class _SplitSwitchMLP(_SplitByAdapter, SwitchMLP):  # type: ignore[misc]
    """Block of experts with adapters."""


_SPLIT: dict[type, type] = {SwitchGLU: _SplitSwitchGLU, SwitchMLP: _SplitSwitchMLP}


def can_split(experts: Module) -> bool:
    """Return whether a block of experts can compute the rows of each adapter by themselves."""
    return type(experts) in _SPLIT


def split_by_adapter(experts: Module, selection: Selection) -> None:
    """Let a block of experts compute the rows of each adapter by themselves.

    Args:
        experts: The block, whose class is replaced.
        selection: The adapter of each row.
    """
    experts.__class__ = _SPLIT[type(experts)]
    cast("Any", experts)._selection = selection  # noqa: SLF001 - of the class above


def _parts(adapters: Sequence[LayerAdapter]) -> tuple[_Part, ...]:
    parts: list[_Part] = []
    ratios = itertools.count()
    for each in adapters:
        start = parts[-1].end if parts else 0
        ratio = None if each.magnitude is None else next(ratios)
        parts.append(_Part(each.number, start, start + each.lora_b.shape[0], each.scale, ratio))
    return tuple(parts)


def _joined(matrices: Sequence[mx.array]) -> mx.array:
    return mx.concatenate([*matrices]) if len(matrices) > 1 else matrices[0]


def _without_bias(linear: Module, x: mx.array) -> mx.array:
    if not isinstance(linear, QuantizedLinear):
        return x @ cast("mx.array", linear["weight"]).T
    return mx.quantized_matmul(
        x,
        linear["weight"],
        scales=linear["scales"],
        biases=linear.get("biases"),
        transpose=True,
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
    )


def _ratio(linear: Module, adapter: LayerAdapter) -> mx.array:
    """Return the magnitude of each output over the norm of its adapted weights.

    mlx_lm computes it at each step, though it depends on no input. Computed in blocks, because the
    adapted weight is as large as the layer's.
    """
    outputs, inputs = adapter.lora_b.shape[1], adapter.lora_a.shape[0]
    count = max(1, _NORM_BLOCK_BYTES // (4 * inputs))
    norms = []
    for rows in (slice(start, start + count) for start in range(0, outputs, count)):
        change = (adapter.scale * adapter.lora_b.T[rows]) @ adapter.lora_a.T
        norms.append(mx.linalg.norm(_dense(linear, rows) + change, axis=1))
    return (cast("mx.array", adapter.magnitude) / mx.concatenate(norms)).astype(mx.float32)


def _dense(linear: Module, rows: slice) -> mx.array:
    """Return some rows of a layer's weight, dequantized."""
    if not isinstance(linear, QuantizedLinear):
        return cast("mx.array", linear["weight"][rows])
    biases = linear.get("biases")
    return mx.dequantize(
        linear["weight"][rows],
        linear["scales"][rows],
        None if biases is None else biases[rows],
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
    )
