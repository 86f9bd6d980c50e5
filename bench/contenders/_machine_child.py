"""Child process measuring the machine at the shapes of one model, driven by JSON lines.

Started as ``_machine_child.py MODEL``. The process prints one line with the bytes that a decode
step reads, then answers each line of stdin, a list of batch sizes, with one line on stdout. Nothing
from this project is imported.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache

_REPEATS = 3
_CORES = os.cpu_count() or 1


class Machine:
    """Measures copies of as many bytes as the weights, and products with all weight matrices.

    Args:
        model: A model with float32 weights.
    """

    def __init__(self, model: Module) -> None:
        self._model = model
        modules = [module for _, module in model.named_modules()]
        self._layers = [m.weight for m in modules if isinstance(m, Linear)]
        embeddings = [m.weight for m in modules if isinstance(m, Embedding)]
        # With tied weights, the output layer multiplies by the embeddings.
        head = getattr(model, "lm_head", None)
        self._head = embeddings[0] if head is None else head.weight
        if head is not None:
            self._layers = [weight for weight in self._layers if weight is not head.weight]
        unread = 0 if head is None else sum(weight.nbytes for weight in embeddings)
        total = sum(weight.nbytes for weight in dict(tree_flatten(model.parameters())).values())
        self.weight_bytes = total - unread
        count = self.weight_bytes // 4 // _CORES
        self._sources = [np.ones(count, dtype=np.float32) for _ in range(_CORES)]
        self._targets = [np.zeros(count, dtype=np.float32) for _ in range(_CORES)]
        self._threads = ThreadPoolExecutor(_CORES)

    def kv_bytes(self, tokens: int) -> int:
        """Return the bytes of a KV cache with a number of tokens."""
        cache = make_prompt_cache(self._model)
        mx.eval(self._model(mx.zeros((1, tokens), dtype=mx.int32), cache=cache))
        states = [part for layer in cache for part in layer.state]
        arrays = [part for part in states if isinstance(part, mx.array)]
        # Caches grow in steps; the tokens are the second axis from the end.
        return sum(array[..., :tokens, :].nbytes for array in arrays)

    def copy_rate(self) -> float:
        """Return bytes read and written per second by copies on all cores."""
        count = max(1, 2**28 // self.weight_bytes)

        def copy(core: int) -> None:
            for _ in range(count):
                np.copyto(self._targets[core], self._sources[core])

        begin = time.perf_counter()
        list(self._threads.map(copy, range(_CORES)))
        copied: int = sum(source.nbytes for source in self._sources) * count
        seconds = time.perf_counter() - begin
        return 2 * copied / seconds

    def product_seconds(self, rows: int, head_rows: int) -> float:
        """Return the time of the products of one forward pass.

        Args:
            rows: Tokens multiplied by the layers' matrices.
            head_rows: Tokens multiplied by the output layer's matrix.
        """
        inputs = {width: mx.random.normal((rows, width)) for width in self._widths()}
        last = mx.random.normal((head_rows, self._head.shape[1]))
        mx.eval(last, *inputs.values())
        begin = time.perf_counter()
        products = [inputs[weight.shape[1]] @ weight.T for weight in self._layers]
        mx.eval(last @ self._head.T, *products)
        return time.perf_counter() - begin

    def _widths(self) -> set[int]:
        return {weight.shape[1] for weight in self._layers}


def main() -> None:
    """Load the model and measure until stdin is closed."""
    model, _ = load(sys.argv[1])
    mx.eval(model.parameters())
    machine = Machine(model)
    sys.stdout.write(json.dumps({"weight_bytes": machine.weight_bytes}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        order = json.loads(line)
        seconds = [
            min(machine.product_seconds(rows, head_rows) for _ in range(_REPEATS))
            for rows, head_rows in order["products"]
        ]
        answer = {
            "copy_rate": max(machine.copy_rate() for _ in range(_REPEATS)),
            "kv_bytes": machine.kv_bytes(order["kv_tokens"]),
            "product_seconds": seconds,
        }
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
