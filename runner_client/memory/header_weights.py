"""In-memory size of a checkpoint's tensors, computed from the headers."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runner_common.model_directory import is_beside_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from runner_common.safetensors import Tensor

_FLOATS = frozenset(("F64", "F32", "F16", "BF16"))
_F8 = frozenset(("F8_E4M3", "F8_E5M2", "F8_E8M0"))

_EXPERT = re.compile(r"\.experts\.\d+\.")

# Companions of a packed weight, which disappear when it is dequantized.
_COMPANIONS = (".scales", ".biases", ".qzeros", ".g_idx", "_scales")
_PACKED = (".weight", ".qweight", "_blocks")


@dataclass(frozen=True, slots=True)
class Weights:
    """Sizes of a model's weights.

    Attributes:
        held_bytes: Memory held after the load.
        transient_bytes: Additional memory needed at the peak of the load.
        stored_item_bytes: Size of one number in the most common floating-point type of the
            stored weights, or of the scales of packed ones.
    """

    held_bytes: int
    transient_bytes: int
    stored_item_bytes: int


def hosted_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the language model, the only ones kept by mlx_lm."""
    return {name: tensor for name, tensor in tensors.items() if not is_beside_text(name)}


_READ_TOGETHER_BYTES = 64 * 2**20
"""The upper limit of source tensors in memory at once; they may be twice as wide as the weights."""


def weigh(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], item_bytes: int | None
) -> Weights:
    """Add up the sizes of a model's tensors.

    Args:
        tensors: The tensors that are kept, by name.
        config: The model's ``config.json``.
        item_bytes: Bytes of one number after the conversion of all weights, packed ones included,
            to one floating-point type; None to keep them as stored.
    """
    held = {t.name: _held_bytes(t, tensors, config, item_bytes) for t in tensors.values()}
    return Weights(
        held_bytes=sum(held.values()),
        transient_bytes=_transient_bytes(tensors.values(), held),
        stored_item_bytes=_stored_item_bytes(tensors.values()),
    )


def _held_bytes(
    tensor: Tensor,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    item_bytes: int | None,
) -> int:
    if item_bytes is None:
        # mlx_lm expands 8-bit floats that match no MLX format to 16 bits.
        return tensor.nbytes * 2 if tensor.dtype in _F8 else tensor.nbytes
    if tensor.dtype in _FLOATS or tensor.dtype in _F8:
        return 0 if _is_companion(tensor.name, tensors) else tensor.size * item_bytes
    elements = _packed_elements(tensor, tensors, config)
    if elements is not None:
        return elements * item_bytes
    return 0 if _is_companion(tensor.name, tensors) else tensor.nbytes


def _is_companion(name: str, tensors: Mapping[str, Tensor]) -> bool:
    for ending in _COMPANIONS:
        base = name.removesuffix(ending)
        if base != name and any(base + packed in tensors for packed in _PACKED):
            return True
    return False


def _packed_elements(
    tensor: Tensor, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> int | None:
    """Return how many numbers a packed weight represents; None if not packed."""
    name = tensor.name
    quantization = _quantization(config)
    if name.endswith(".qweight"):  # AWQ and GPTQ
        bits = quantization.get("bits")
        return tensor.nbytes * 8 // (bits if isinstance(bits, int) and bits > 0 else 4)
    if name.endswith("_blocks"):  # gpt-oss: two 4-bit numbers a byte
        return tensor.nbytes * 2
    path = name.removesuffix(".weight")
    scales = tensors.get(f"{path}.scales")
    if path == name or tensor.dtype != "U32" or scales is None or not scales.size:
        return None
    declared = quantization.get(path)
    return _mlx_elements(tensor, scales, declared if isinstance(declared, dict) else quantization)


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    declared = config.get("quantization") or config.get("quantization_config")
    return declared if isinstance(declared, dict) else {}


def _mlx_elements(weight: Tensor, scales: Tensor, declared: Mapping[str, Any]) -> int:
    """Return how many numbers a weight packed by MLX holds, with one scale per group.

    The two shapes only give bits times ``group_size``. If the declared pair does not match them (a
    layer quantized differently under another name), the pair with the most numbers is used.
    """
    product = weight.nbytes * 8 // scales.size
    bits, group_size = declared.get("bits"), declared.get("group_size")
    if isinstance(bits, int) and isinstance(group_size, int) and bits * group_size == product:
        return scales.size * group_size
    groups = [size for size in (128, 64, 32, 16) if product % size == 0 and product // size <= 8]
    return scales.size * (groups[0] if groups else product)


def _transient_bytes(kept: Iterable[Tensor], held: Mapping[str, int]) -> int:
    """Return the additional memory at the peak of a load.

    Tensors are converted from sources that are freed once their copies exist. Some are read at
    the same time: those of 32 MiB of weights, or a single larger one. A dequantized weight also
    exists in 16 bits in between. Experts stored one by one are first stacked into one tensor, so
    those of a layer count as one.
    """
    sources: Counter[str] = Counter()
    for tensor in kept:
        unit = _EXPERT.sub(".experts.", tensor.name)
        if unit != tensor.name or held[tensor.name] != tensor.nbytes:
            expanded = tensor.dtype not in _FLOATS and held[tensor.name] > tensor.nbytes
            sources[unit] += tensor.nbytes + (held[tensor.name] // 2 if expanded else 0)
    return max(*sources.values(), min(sources.total(), _READ_TOGETHER_BYTES), 0)


def _stored_item_bytes(kept: Iterable[Tensor]) -> int:
    sizes: Counter[int] = Counter()
    for tensor in kept:
        if tensor.dtype in _FLOATS and tensor.size:
            sizes[tensor.nbytes // tensor.size] += tensor.size
    return sizes.most_common(1)[0][0] if sizes else 2
