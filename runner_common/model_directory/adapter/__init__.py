"""Reading of the files of LoRA adapters, as mlx_lm writes them."""

from runner_common.model_directory.adapter.files import AdapterFiles, read_adapter

__all__ = ["AdapterFiles", "read_adapter"]
