"""Every name this project takes from mlx_lm, in one place.

``mlx_lm.generate`` and others must be imported as modules' names: the package
exports functions that hide its modules. Tested with 0.32.2.
"""

from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import dequantize_model, load_config, load_model, load_tokenizer

__all__ = [
    "BatchGenerator",
    "dequantize_model",
    "load_config",
    "load_model",
    "load_tokenizer",
    "make_prompt_cache",
]
