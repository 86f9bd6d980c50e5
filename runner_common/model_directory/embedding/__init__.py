"""Reading of the files of models that embed texts, in the layout of sentence-transformers."""

from runner_common.model_directory.embedding.base_model import missing_prefix
from runner_common.model_directory.embedding.modules import EmbeddingFiles, read_embedding

__all__ = ["EmbeddingFiles", "missing_prefix", "read_embedding"]
