"""Reading of a model's directory, except for the weights themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runner_common.model_directory.configuration import (
    CONFIG,
    Configuration,
    read_configuration,
)
from runner_common.model_directory.embedding import (
    EmbeddingFiles,
    missing_prefix,
    read_embedding,
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
    """Content of a model's directory.

    Attributes:
        path: The directory.
        weight_files: The files to load, in a fixed order.
        tensors: Tensors of the weight files by name.
        configuration: Content of the other files.
        notes: Files that are not loaded, and contradictions.
        embedding: How the model embeds texts.
        name_prefix: Prefix that the names of the tensors lack; empty if they are complete.
    """

    path: Path
    weight_files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    configuration: Configuration
    notes: tuple[str, ...]
    embedding: EmbeddingFiles
    name_prefix: str


def read_model_directory(path: Path) -> ModelDirectory:
    """Read a directory's configuration and the headers of its weights.

    Raises:
        ModelUnusableError: The directory is incomplete, damaged or ambiguous.
    """
    try:
        require_files(path)
        # First, because a directory without config.json is not a model's.
        stored = read_object(path / CONFIG)
        choice = choose_weight_files(path)
        tensors = read_tensors(choice)
        embedding = read_embedding(path, stored)
        configuration = read_configuration(
            path, stored, tensors, choice.tensors, embeds=not embedding.problem
        )
    except ModelUnusableError:
        raise
    except OSError as error:
        raise ModelUnusableError(f"{path} cannot be read: {error}", str(path)) from error
    # The model's files are the only input of the code above, so they are the cause.
    except Exception as error:
        raise ModelUnusableError(
            f"{path} cannot be read: its files have invalid contents "
            f"({type(error).__name__}: {error})",
            str(path),
        ) from error
    notes = (*choice.notes, *configuration.notes)
    prefix = missing_prefix(tensors)
    return ModelDirectory(
        path, choice.files, tensors, configuration, notes, embedding, name_prefix=prefix
    )
