"""Lookup and reading of a model's files, with the errors of this library."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from runner_client.errors import ModelNotFoundError, ModelUnsupportedError
from runner_common.model_directory import (
    AdapterFiles,
    Located,
    ModelDirectory,
    ModelMissingError,
    ModelUnusableError,
    locate,
    read_adapter,
    read_model_directory,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


def find_model(model: str, environ: Mapping[str, str] = os.environ) -> Located:
    """Locate a model on this machine; never download.

    Args:
        model: A directory, or a hub id in the local Hugging Face cache.
        environ: The environment of the process that will load the model.

    Raises:
        ModelNotFoundError: The model is neither; the message lists the paths that were tried.
    """
    with _translated():
        return locate(model, environ)


def read_model(path: Path) -> ModelDirectory:
    """Read a model's configuration and the headers of the weight files.

    Raises:
        ModelUnsupportedError: The directory is incomplete, damaged or ambiguous.
    """
    with _translated():
        return read_model_directory(path)


def read_adapter_files(path: Path) -> AdapterFiles:
    """Read an adapter's configuration and the header of its tensors.

    Raises:
        ModelUnsupportedError: A file is missing or damaged, or the adapter is of another kind.
    """
    with _translated():
        return read_adapter(path)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except ModelMissingError as error:
        raise ModelNotFoundError(str(error), model=error.model) from error
    except ModelUnusableError as error:
        raise ModelUnsupportedError(str(error), model=error.model) from error
