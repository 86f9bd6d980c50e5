"""Selection of a model's weight files, and their tensors.

mlx_lm loads every ``model*.safetensors``: a file left over from another download is loaded too, and
the order of the directory decides which of two tensors is used. Here the index decides, or else the
file names; if neither is clear, the model is refused.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from runner_common.model_directory.errors import ModelUnusableError
from runner_common.model_directory.json_files import is_lfs_pointer, lfs_error, read_object
from runner_common.safetensors import HeaderError, Tensor, read_header

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_OTHER_FORMATS = frozenset((".bin", ".gguf", ".npz", ".pth", ".pt"))
_ADAPTERS = frozenset(("adapters.safetensors", "adapter_model.safetensors"))
_COMPARED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class WeightChoice:
    """Weight files of a model.

    Attributes:
        files: The files to load, in a fixed order.
        notes: The weight files that are not loaded, with the reasons.
        tensors: Names of the tensors in the index; empty without an index.
    """

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    tensors: frozenset[str] = frozenset()


def choose_weight_files(directory: Path) -> WeightChoice:
    """Select the model's weight files, by the index or else by name.

    Raises:
        ModelUnusableError: There are no weight files, some are missing, or the selection is
            ambiguous.
    """
    indices = sorted(directory.glob("*.safetensors.index.json"))
    index = directory / _INDEX
    if index not in indices and len(indices) == 1:
        (index,) = indices
    if not index.exists():
        return _chosen_by_name(directory, "")
    try:
        named, tensors = _indexed(index)
    except ModelUnusableError as error:
        return _chosen_by_name(directory, str(error))
    missing = [file for file in named if not _is_there(file)]
    if missing:
        return _chosen_by_name(directory, _describe_missing(directory, index, missing))
    others = sorted(set(_safetensors(directory)) - set(named))
    notes = _unused_notes(others, f"{index.name} does not list it")
    return WeightChoice(tuple(named), notes, tensors)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor, and the file that contains it."""

    file: Path
    tensor: Tensor


def read_tensors(choice: WeightChoice) -> dict[str, StoredTensor]:
    """Return the tensors of weight files by name, each from the first file that has it.

    Raises:
        ModelUnusableError: A file is damaged, or two files have a tensor with different bytes.
    """
    found: dict[str, StoredTensor] = {}
    for file in choice.files:
        for tensor in read_weight_header(file):
            stored = StoredTensor(file, tensor)
            known = found.setdefault(tensor.name, stored)
            if known is not stored and not has_same_bytes(known, stored):
                raise ModelUnusableError(
                    f"{tensor.name} is in {known.file} and in {file} with different values: "
                    "remove the file that does not belong to the model",
                    str(file.parent),
                )
    return found


def has_same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two tensors have the same type, shape and bytes.

    Raises:
        OSError: A file cannot be read.
    """
    first, second = one.tensor, other.tensor
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with one.file.open("rb") as left, other.file.open("rb") as right:
        for start in range(0, first.nbytes, _COMPARED_BYTES):
            size = min(_COMPARED_BYTES, first.nbytes - start)
            if _bytes_at(left, first, start, size) != _bytes_at(right, second, start, size):
                return False
    return True


def _bytes_at(file: BinaryIO, tensor: Tensor, start: int, size: int) -> bytes:
    return os.pread(file.fileno(), size, tensor.position + start)


def read_weight_header(file: Path) -> tuple[Tensor, ...]:
    """Return the tensors of one weight file, ordered by position.

    Raises:
        ModelUnusableError: The file is truncated, is a Git LFS pointer, or its header is invalid.
    """
    try:
        return read_header(file)
    except HeaderError as error:
        if file.is_file() and is_lfs_pointer(file):
            raise lfs_error(file) from error
        raise ModelUnusableError(str(error), str(file.parent)) from error


def _indexed(index: Path) -> tuple[list[Path], frozenset[str]]:
    """Return the files named in an index, sorted, and the names of the tensors.

    Raises:
        ModelUnusableError: The index has no map of tensors to files inside the directory.
    """
    names: Any = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelUnusableError(f"{index}: it has no weight_map", str(index.parent))
    for name in names.values():
        if not isinstance(name, str) or not _is_weight_file(name):
            raise ModelUnusableError(
                f"{index}: {name!r} is not a *.safetensors of this directory", str(index.parent)
            )
    return [index.parent / name for name in sorted(set(names.values()))], frozenset(names)


def _is_weight_file(name: str) -> bool:
    path = PurePosixPath(name)
    is_inside = not path.is_absolute() and ".." not in path.parts
    return is_inside and path.suffix == ".safetensors" and "\0" not in name


def _is_there(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a name too long for the file system
        return False


def _safetensors(directory: Path) -> list[Path]:
    """Return the candidates for weights of the model itself."""
    return sorted(
        file
        for file in directory.iterdir()
        if file.suffix == ".safetensors" and file.name not in _ADAPTERS and file.is_file()
    )


def _chosen_by_name(directory: Path, problem: str) -> WeightChoice:
    """Select weight files without a usable index.

    Args:
        directory: The model's directory.
        problem: Problem of the index; empty if there is no index.
    """
    files = _safetensors(directory)
    whole, parts = _shard_sets(files)
    singles = [file for file in files if not _SHARD.fullmatch(file.name)]
    named = [file for file in singles if file.name.startswith("model")]
    candidates = [*whole, *([named] if named else [])]
    if not candidates and len(singles) == 1:
        candidates = [singles]
    if len(candidates) != 1:
        raise _no_choice(directory, files, candidates, parts, problem)
    chosen = _without_overlap(candidates[0])
    others = sorted(set(files) - set(chosen))
    notes = _unused_notes(others, f"it does not belong to {chosen[0].name}")
    return WeightChoice(tuple(chosen), (*([f"{problem}; not used"] if problem else []), *notes))


def _shard_sets(files: list[Path]) -> tuple[list[list[Path]], list[str]]:
    """Return the complete sets of shards, and descriptions of missing shards."""
    sets: dict[tuple[str, int], dict[int, Path]] = defaultdict(dict)
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            sets[match["name"], int(match["count"])][int(match["number"])] = file
    whole, lacking = [], []
    for (name, count), shards in sets.items():
        absent = [n for n in range(1, count + 1) if n not in shards]
        if absent:
            first = f"{name}-{absent[0]:05}-of-{count:05}.safetensors"
            lacking.append(f"{first} is missing" + _and_more(len(absent)))
        else:
            whole.append([shards[n] for n in range(1, count + 1)])
    return whole, lacking


def _without_overlap(files: list[Path]) -> list[Path]:
    """Return only ``model.safetensors`` if the other files merely repeat some of its tensors.

    ``model.safetensors`` beside ``model.fp16.safetensors`` is one model in two formats; with
    ``model-extra.safetensors`` it may be one model in two files.
    """
    whole = next((file for file in files if file.name == _WHOLE), None)
    if len(files) == 1 or whole is None:
        return files
    names = {file: {tensor.name for tensor in read_weight_header(file)} for file in files}
    total = set[str]().union(*names.values())
    if len(total) == sum(map(len, names.values())) or names[whole] != total:
        return files
    return [whole]


def _no_choice(
    directory: Path,
    files: list[Path],
    candidates: list[list[Path]],
    lacking: list[str],
    problem: str,
) -> ModelUnusableError:
    if candidates:
        firsts = " or ".join(candidate[0].name for candidate in candidates)
        what = f"either {firsts} may be the model: remove the files that do not belong to it"
    elif lacking:
        what = f"{lacking[0]}; finish the download, or copy the missing files"
    elif files:
        names = ", ".join(file.name for file in files[:3])
        what = f"no index lists {names}, and none has the name of a model's only weights"
    else:
        what = f"no *.safetensors in it{_describe_others(directory)}"
    return ModelUnusableError(
        f"{directory}: {problem.removeprefix(f'{directory}: ')}{'; ' if problem else ''}{what}",
        str(directory),
    )


def _describe_others(directory: Path) -> str:
    """Describe files that could have been weights, in parentheses; empty if there are none."""
    entries = sorted(directory.iterdir())
    if links := [file.name for file in entries if file.suffix == ".safetensors"]:
        return f" ({links[0]} is not a file, or a broken link: finish the download)"
    if others := [file.name for file in entries if file.suffix in _OTHER_FORMATS]:
        return f" (only {', '.join(others[:3])}: convert it with mlx_lm.convert)"
    return ""


def _describe_missing(directory: Path, index: Path, missing: list[Path]) -> str:
    name = missing[0].relative_to(directory)
    return f"{directory}: {index.name} lists {len(missing)} missing file(s), first {name}"


def _unused_notes(files: list[Path], why: str) -> tuple[str, ...]:
    return tuple(f"{file.name} is not loaded: {why}" for file in files)


def _and_more(count: int) -> str:
    return f", and {count - 1} more" if count > 1 else ""
