"""Reading of a model's name, directory, files and configuration.

Client and server share this code, so that the server loads exactly the models that the client's
gate accepts.
"""

from runner_common.model_directory.adapter import AdapterFiles, read_adapter
from runner_common.model_directory.configuration import Configuration, text_part
from runner_common.model_directory.embedding import EmbeddingFiles
from runner_common.model_directory.entries import MAX_TEXT_BYTES, counts_beside_weights
from runner_common.model_directory.errors import (
    ModelDirectoryError,
    ModelMissingError,
    ModelUnusableError,
)
from runner_common.model_directory.json_files import is_lfs_pointer, lfs_error
from runner_common.model_directory.locating import Located, hub_cache, locate
from runner_common.model_directory.modalities import is_beside_text
from runner_common.model_directory.reading import ModelDirectory, read_model_directory
from runner_common.model_directory.rope import has_rope_by_kind, rope_kind
from runner_common.model_directory.weight_files import StoredTensor

__all__ = [
    "MAX_TEXT_BYTES",
    "AdapterFiles",
    "Configuration",
    "EmbeddingFiles",
    "Located",
    "ModelDirectory",
    "ModelDirectoryError",
    "ModelMissingError",
    "ModelUnusableError",
    "StoredTensor",
    "counts_beside_weights",
    "has_rope_by_kind",
    "hub_cache",
    "is_beside_text",
    "is_lfs_pointer",
    "lfs_error",
    "locate",
    "read_adapter",
    "read_model_directory",
    "rope_kind",
    "text_part",
]
