"""Errors about a model's name or directory."""

from __future__ import annotations


class ModelDirectoryError(Exception):
    """A model cannot be used. The message names the file and says what to do.

    Args:
        message: Description of the problem.
        model: The model's name or directory.
    """

    def __init__(self, message: str, model: str) -> None:
        super().__init__(message)
        self.model = model


class ModelMissingError(ModelDirectoryError):
    """The name is neither a directory nor a hub id in the local cache."""


class ModelUnusableError(ModelDirectoryError):
    """The directory is incomplete, damaged or ambiguous."""
