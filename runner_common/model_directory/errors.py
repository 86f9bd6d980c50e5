"""Why a model's name or directory cannot be used."""

from __future__ import annotations


class ModelDirectoryError(Exception):
    """A model that cannot be used; the message names the file, and says what to do.

    Args:
        message: What is wrong.
        model: The model's name or directory.
    """

    def __init__(self, message: str, model: str) -> None:
        super().__init__(message)
        self.model = model


class ModelMissingError(ModelDirectoryError):
    """No directory and no hub id in the local cache has this name."""


class ModelUnusableError(ModelDirectoryError):
    """The directory is incomplete, damaged or ambiguous."""
