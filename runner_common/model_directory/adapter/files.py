"""The files of one adapter: its configuration and the header of its tensors.

mlx_lm writes both (``mlx_lm.lora``), and ``mlx_lm.tuner.utils.load_adapters`` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner_common.model_directory.errors import ModelUnusableError
from runner_common.model_directory.json_files import is_lfs_pointer, lfs_error, read_object
from runner_common.safetensors import HeaderError, Tensor, read_header

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapters.safetensors"

_PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter, without its tensors.

    Attributes:
        path: Its directory.
        is_dora: Whether the adapter also has a magnitude for each output (DoRA).
        rank: Rank of the low-rank matrices.
        scale: Factor on their product.
        keys: Names of the layers that it changes, each relative to a block of the model or to the
            whole model; None for all layers of a kind that can be changed.
        num_layers: Number of the last blocks of the model that it changes; 0 or less for all.
        tensors: The tensors by name.
    """

    path: Path
    is_dora: bool
    rank: int
    scale: float
    keys: frozenset[str] | None
    num_layers: int
    tensors: Mapping[str, Tensor]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that determine the adapter's effect."""
        return self.path / CONFIG_FILE, self.path / TENSORS_FILE

    @property
    def tensors_file(self) -> Path:
        """The file with the tensors."""
        return self.path / TENSORS_FILE

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_adapter(path: Path) -> AdapterFiles:
    """Read an adapter's configuration and the header of its tensors.

    Args:
        path: The adapter's directory.

    Raises:
        ModelUnusableError: A file is missing or damaged, or the adapter is of another kind.
    """
    _refuse_peft(path)
    config = read_object(path / CONFIG_FILE)
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        raise _unusable(
            path,
            "its fine_tune_type is 'full': it has all weights of a model; fuse it into the model "
            "with mlx_lm.fuse, and load the result as a model",
        )
    if kind not in ("lora", "dora"):
        raise _unusable(path, f"its fine_tune_type is {kind!r}; expected 'lora' or 'dora'")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise _unusable(path, "lora_parameters is missing or not an object")
    return AdapterFiles(
        path=path,
        is_dora=kind == "dora",
        rank=_integer(path, "lora_parameters.rank", parameters.get("rank"), least=1),
        scale=_scale(path, parameters),
        keys=_keys(path, parameters.get("keys")),
        num_layers=_integer(path, "num_layers", config.get("num_layers")),
        tensors=_tensors(path / TENSORS_FILE),
    )


def _refuse_peft(path: Path) -> None:
    if (path / TENSORS_FILE).exists():
        return
    if any((path / name).exists() for name in _PEFT_FILES):
        raise _unusable(
            path,
            f"it is a PEFT adapter; merge it into its model with PEFT's merge_and_unload and "
            f"convert that with mlx_lm.convert, or convert its tensors to mlx_lm's {TENSORS_FILE}",
        )


def _integer(path: Path, name: str, value: object, least: int | None = None) -> int:
    if type(value) is not int or (least is not None and value < least):
        expected = "a whole number" if least is None else f"a whole number, {least} or more"
        raise _unusable(path, f"{name} is {_shown(value)}; expected {expected}")
    return value


def _scale(path: Path, parameters: Mapping[str, Any]) -> float:
    value = parameters.get("scale")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    hint = ", and alpha, which it has, is not read" if "alpha" in parameters else ""
    raise _unusable(path, f"lora_parameters.scale is {_shown(value)}; expected a number{hint}")


def _keys(path: Path, value: object) -> frozenset[str] | None:
    if value is None:
        return None
    if isinstance(value, list) and all(isinstance(key, str) for key in value):
        return frozenset(value)
    raise _unusable(path, f"lora_parameters.keys is {_shown(value)}; expected a list of names")


def _tensors(file: Path) -> Mapping[str, Tensor]:
    try:
        if is_lfs_pointer(file):
            raise lfs_error(file)
        return {tensor.name: tensor for tensor in read_header(file)}
    except FileNotFoundError:
        raise _unusable(file.parent, f"it has no {file.name}") from None
    except (HeaderError, OSError) as error:
        raise _unusable(file.parent, str(error)) from error


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:80]


def _unusable(path: Path, why: str) -> ModelUnusableError:
    return ModelUnusableError(f"the adapter in {path} cannot be used: {why}", str(path))
