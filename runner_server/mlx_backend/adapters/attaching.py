"""Attachment of adapters to a built model with lazy weights.

Layers, names and shapes of tensors are those of ``linear_to_lora_layers`` in
``mlx_lm.tuner.utils``, so that the files of an adapter have the same meaning as there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear
from mlx.utils import tree_unflatten

from runner_common.model_directory import AdapterFiles
from runner_server.errors import ModelUnsupported
from runner_server.mlx_backend.adapters.layers import (
    AdaptedLinear,
    AdaptedSwitchLinear,
    LayerAdapter,
    can_split,
    split_by_adapter,
)
from runner_server.mlx_backend.adapters.selection import NO_ADAPTERS, Attached, Selection
from runner_server.mlx_backend.loading.finding import NamedAdapter
from runner_server.mlx_backend.loading.weight_files import WeightFiles
from runner_server.mlx_backend.upstream.names import (
    QuantizedSwitchLinear,
    SwitchLinear,
)

_LINEAR = (Linear, QuantizedLinear)
_EXPERTS = (SwitchLinear, QuantizedSwitchLinear)
_KINDS = (*_LINEAR, *_EXPERTS, Embedding, QuantizedEmbedding)
"""Layers that an adapter without ``keys`` changes."""

_COMPILED = frozenset({"kimi_k3"})
"""Modules of mlx_lm that compile a part of a model with layers in it on some devices. A compiled
part would keep the adapters of its first call."""

_FLOATS = frozenset({"F32", "F16", "BF16"})

_MOST_PROBLEMS = 3
"""Most tensors that a refusal names."""


def attach(
    model: Module, adapters: Sequence[NamedAdapter], weights: WeightFiles, *, widens: bool
) -> Attached:
    """Replace layers of a model by layers with adapters, whose tensors are lazy.

    Args:
        model: A model with lazy weights, in the dtype of the load.
        adapters: The adapters.
        weights: Gives the lazy tensors.
        widens: Whether 16-bit tensors become float32, like the weights of the model.

    Raises:
        ModelUnsupported: An adapter does not fit the model.
    """
    if not adapters:
        return NO_ADAPTERS
    _require_uncompiled(model)
    modules = dict(model.named_modules())
    of_layers: dict[str, list[LayerAdapter]] = defaultdict(list)
    names = []
    for number, adapter in enumerate(adapters, 1):
        chosen = _chosen(model, modules, adapter.files)
        _require_fit(adapter, modules, chosen)
        arrays = weights.load(str(adapter.files.tensors_file))
        for layer in chosen:
            is_wide = widens or isinstance(modules[layer], _EXPERTS)
            of_layers[layer].append(_of_layer(number, adapter.files, arrays, layer, is_wide))
        names.append(frozenset(chosen))
    attached = Attached(tuple(each.name for each in adapters), tuple(names))
    _replace(model, modules, of_layers, attached.selection)
    return attached


def _require_uncompiled(model: Module) -> None:
    kind = type(model).__module__.rpartition(".")[2]
    if kind in _COMPILED:
        raise ModelUnsupported(
            f"adapters cannot be used with models of type {kind}: mlx_lm compiles parts of them; "
            "fuse the adapter into the model with mlx_lm.fuse, and load the result"
        )


def _chosen(model: Module, modules: Mapping[str, Module], files: AdapterFiles) -> list[str]:
    """Return the names of the layers that an adapter changes, as mlx_lm chooses them."""
    blocks = cast("list[Module]", cast("Any", model).layers)
    keys = _default_keys(blocks) if files.keys is None else files.keys
    inside = {
        id(module)
        for block in blocks[-max(files.num_layers, 0) :]
        for name, module in block.named_modules()
        if name in keys
    }
    return [name for name, module in modules.items() if id(module) in inside or name in keys]


def _default_keys(blocks: Sequence[Module]) -> frozenset[str]:
    return frozenset(
        name
        for block in blocks
        for name, module in block.named_modules()
        if isinstance(module, _KINDS) or hasattr(module, "to_lora")
    )


# -- whether it fits ---------------------------------------------------------------


def _require_fit(
    adapter: NamedAdapter, modules: Mapping[str, Module], chosen: Sequence[str]
) -> None:
    """Check the names and shapes of an adapter's tensors against the model.

    Raises:
        ModelUnsupported: They differ, or a layer cannot have an adapter here.
    """
    files = adapter.files
    expected: dict[str, tuple[int, ...]] = {}
    for layer in chosen:
        if why := _refusal(modules, layer, files):
            raise _unfit(adapter, [why])
        expected.update(_shapes(modules[layer], layer, files))
    if problems := list(_problems(files, expected)):
        raise _unfit(adapter, problems)
    if not expected:
        raise _unfit(adapter, ["it changes none of the model's layers"])


def _refusal(modules: Mapping[str, Module], layer: str, files: AdapterFiles) -> str | None:
    module = modules[layer]
    kind = type(module).__name__
    if hasattr(module, "to_lora") or not isinstance(module, (*_LINEAR, *_EXPERTS)):
        return f"{layer} is a layer of type {kind}, which this server cannot adapt"
    if isinstance(module, _EXPERTS):
        if files.is_dora:
            return f"{layer} is a layer of experts, for which mlx_lm has no DoRA"
        if not can_split(modules[layer.rpartition(".")[0]]):
            return f"{layer} is a layer of experts outside a block that this server can adapt"
    return None


def _shapes(module: Any, layer: str, files: AdapterFiles) -> dict[str, tuple[int, ...]]:
    """Return the shapes that mlx_lm expects, by the names of the tensors."""
    rank = files.rank
    if isinstance(module, _EXPERTS):
        shapes: dict[str, tuple[int, ...]] = {
            "lora_a": (module.num_experts, rank, module.input_dims),
            "lora_b": (module.num_experts, module.output_dims, rank),
        }
    else:
        outputs, inputs = module["weight"].shape
        if isinstance(module, QuantizedLinear):
            inputs = inputs * 32 // module.bits
        shapes = {"lora_a": (inputs, rank), "lora_b": (rank, outputs)}
        if files.is_dora:
            shapes["m"] = (outputs,)
    return {f"{layer}.{name}": shape for name, shape in shapes.items()}


def _problems(files: AdapterFiles, expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name, shape in expected.items():
        tensor = files.tensors.get(name)
        if tensor is None:
            yield f"{name} is missing"
        elif tensor.shape != shape:
            yield f"{name} has the shape {tensor.shape}, and the model needs {shape}"
        elif tensor.dtype not in _FLOATS:
            yield f"{name} has the type {tensor.dtype}; expected {', '.join(sorted(_FLOATS))}"
    for name in files.tensors:
        if name not in expected:
            yield f"{name} belongs to no layer that the adapter changes"


def _unfit(adapter: NamedAdapter, problems: Sequence[str]) -> ModelUnsupported:
    more = len(problems) - _MOST_PROBLEMS
    shown = "; ".join(problems[:_MOST_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
    return ModelUnsupported(
        f"the adapter {adapter.name!r} in {adapter.files.path} does not fit the model: {shown}"
    )


# -- the layers --------------------------------------------------------------------


def _of_layer(
    number: int, files: AdapterFiles, arrays: Mapping[str, mx.array], layer: str, is_wide: bool
) -> LayerAdapter:
    def tensor(name: str) -> mx.array:
        found = arrays[f"{layer}.{name}"]
        return found.astype(mx.float32) if is_wide else found

    return LayerAdapter(
        number,
        tensor("lora_a"),
        tensor("lora_b"),
        files.scale,
        tensor("m") if files.is_dora else None,
    )


def _replace(
    model: Module,
    modules: Mapping[str, Module],
    of_layers: Mapping[str, Sequence[LayerAdapter]],
    selection: Selection,
) -> None:
    split: set[str] = set()
    adapted: list[tuple[str, Module]] = []
    for layer, adapters in of_layers.items():
        module, block = modules[layer], layer.rpartition(".")[0]
        if not isinstance(module, _EXPERTS):
            adapted.append((layer, AdaptedLinear(module, adapters, selection)))
            continue
        adapted.append((layer, AdaptedSwitchLinear(module, adapters, selection)))
        if block not in split:
            split_by_adapter(modules[block], selection)
            split.add(block)
    model.update_modules(cast("Any", tree_unflatten(adapted)))
