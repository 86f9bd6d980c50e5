"""Whether a model computes the activation that its configuration names."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from runner_server.mlx_backend.upstream.names import BuiltModel

# In this order: Gemma's first files name an activation in hidden_act that was never used.
_KEYS = ("hidden_activation", "hidden_act", "activation_function")

_SAME = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swiglu": "silu",
    "swish": "silu",
}
"""Names of transformers, by the function they stand for."""

_GELUS = {"gelu": "gelu", "gelu_tanh": "gelu_approx"}
"""Both kinds of GELU, by what ``mlx.nn`` calls them."""

_IN_SOURCE = {
    "gelu": r"\bgelu\(|\b_?precise_gelu\b",
    "gelu_tanh": r"\bgelu_approx\b",
    "relu": r"\brelu\((?![^\n]*square)",
    "relu2": r"\brelu2\b|\brelu_squared\b",
    "silu": r"\bsilu\b|\b_?swiglu\b|\bSwiGLU\b",
}
"""How each is called in the modules of mlx_lm, which have it written into their layers."""


def ignored_activation(text: Mapping[str, Any], built: BuiltModel) -> Iterator[str]:
    """Yield what is wrong if a model does not compute the activation it is said to have.

    Args:
        text: The part of its configuration that describes the language model.
        built: The model.
    """
    key = _key(text, built)
    if key is None:
        return
    name, source = text[key], written_in(built)
    wanted = _SAME.get(name) if isinstance(name, str) else None
    if wanted is None:
        # Names of a type's own ("gegelu", "xielu") are those of its only activation.
        if not isinstance(name, str) or name not in source:
            yield f"{key} = {name!r} in config.json is not an activation that mlx_lm has here"
        return
    same = _GELUS if wanted in _GELUS else (wanted,)
    if not any(re.search(_IN_SOURCE[each], source) for each in same):
        yield f"{key} = {name!r} in config.json has no effect in mlx_lm"


def written_in(built: BuiltModel) -> str:
    """Return the source of the modules that a model's layers are written in."""
    return "\n".join(map(inspect.getsource, _modules(built)))


def use_named_gelu(text: Mapping[str, Any], built: BuiltModel) -> None:
    """Have a model compute GELU exactly or by its approximation, as its configuration says.

    mlx_lm has one of the two written into the layers of a type: GPT-NeoX is said to have the
    exact one, StarCoder2 and Gemma the approximation, and 0.32.2 computes the other.

    Args:
        text: The part of its configuration that describes the language model.
        built: The model.
    """
    key = _key(text, built)
    wanted = _SAME.get(str(text[key])) if key else None
    for module in _modules(built):
        found = [name for name in _GELUS if re.search(_IN_SOURCE[name], inspect.getsource(module))]
        if len(found) == 1 and isinstance(library := vars(module).get("nn"), ModuleType | _Gelu):
            plain = library.plain if isinstance(library, _Gelu) else library
            vars(module)["nn"] = _Gelu(plain, wanted) if wanted in _GELUS else plain


class _Gelu:
    """``mlx.nn`` with one function under both names of GELU.

    Args:
        plain: ``mlx.nn`` itself.
        kind: One of ``_GELUS``.
    """

    def __init__(self, plain: ModuleType, kind: str) -> None:
        self.plain = plain
        self.gelu = self.gelu_approx = getattr(plain, _GELUS[kind])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)


def _key(text: Mapping[str, Any], built: BuiltModel) -> str | None:
    """Return the setting that names the activation, unless the model's class goes by it."""
    key = next((key for key in _KEYS if text.get(key) is not None), None)
    # Nemotron's class takes it, and does not look at it.
    is_read = key in built.arguments and re.search(rf"\.{key}\b", written_in(built))
    return None if is_read else key


def _modules(built: BuiltModel) -> list[ModuleType]:
    """Return the modules that the model's layers are written in."""
    names = {type(module).__module__ for module in built.model.modules()}
    return [sys.modules[name] for name in sorted(names) if name.startswith("mlx_lm.models.")]
