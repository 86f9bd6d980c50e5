"""A model's directory as client and server see it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runner_common.model_directory.configuration import (
    CONFIG,
    Configuration,
    read_configuration,
)
from runner_common.model_directory.entries import require_files
from runner_common.model_directory.errors import ModelUnusableError
from runner_common.model_directory.json_files import read_object
from runner_common.model_directory.weight_files import (
    StoredTensor,
    choose_weight_files,
    read_tensors,
)


@dataclass(frozen=True, slots=True)
class ModelDirectory:
    """What a model's directory holds.

    Attributes:
        path: The directory.
        weight_files: The files to load, in a fixed order.
        tensors: Their tensors by name.
        configuration: What the other files say.
        notes: Files that were passed over, and contradictions, in words.
    """

    path: Path
    weight_files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    configuration: Configuration
    notes: tuple[str, ...]


def read_model_directory(path: Path) -> ModelDirectory:
    """Read a directory's configuration and the headers of its weights.

    Raises:
        ModelUnusableError: The directory is incomplete, damaged or ambiguous.
    """
    try:
        require_files(path)
        # First: without it, nothing else tells that this is a model's directory.
        stored = read_object(path / CONFIG)
        choice = choose_weight_files(path)
        tensors = read_tensors(choice)
        configuration = read_configuration(path, stored, tensors, choice.tensors)
    except ModelUnusableError:
        raise
    except OSError as error:
        raise ModelUnusableError(f"{path} cannot be read: {error}", str(path)) from error
    # Nothing but the model's files has been looked at.
    except Exception as error:
        raise ModelUnusableError(
            f"{path} cannot be read: its files say what no model has "
            f"({type(error).__name__}: {error})",
            str(path),
        ) from error
    notes = (*choice.notes, *configuration.notes)
    return ModelDirectory(path, choice.files, tensors, configuration, notes)
