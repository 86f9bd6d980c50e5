"""Tensors of a multimodal checkpoint outside the language model."""

from __future__ import annotations

import re

_BESIDE_TEXT = re.compile(
    r"(^|\.)(vision\w*|visual|image\w*|audio\w*|multi_modal\w*|mm_\w+|embed_(vision|audio|image)"
    r"|patch_\w+|vit\w*|sam_model|resampler|connector|projector)\."
    r"|(^|\.)(image_newline|view_sep\w*|tile_\w+)$"
)


def is_beside_text(name: str) -> bool:
    """Return whether a tensor belongs to the image or audio parts of a model.

    mlx_lm runs only the language model of such a checkpoint and drops these tensors.

    Args:
        name: The tensor's name in the checkpoint.
    """
    return bool(_BESIDE_TEXT.search(name))
