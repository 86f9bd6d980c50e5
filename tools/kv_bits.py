"""Quality and speed of quantized KV caches, as in docs/kv-cache.md: ``python -m tools.kv_bits``.

Quality is that of the demo model on modules of Python's standard library that it was not trained
on. Speed is that of the attention of a small model with random weights, in caches with random
numbers: a decode step of one row and of four, and a prefill chunk.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import click
import mlx.core as mx

from runner_server.engine.types import LoadSpec, Sampling, Token
from runner_server.mlx_backend import MlxBackend
from runner_server.mlx_backend.cache.quantized import fill, quantized
from runner_server.mlx_backend.cache.row_caches import merge
from tools.demo_model.corpus import collect
from tools.local_batch import decode_with_drafts, start_alone
from tools.memory.models import scaled, write_model

BITS = (0, 8, 4)
DEMO = Path(__file__).parents[1] / "runner_server/demo/model"

_WINDOW, _CHUNK = 1024, 128
_PROMPT_TOKENS, _GREEDY_TOKENS = 256, 256
_SPEED_TOKENS = (4096, 32768)
_SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 65536,
}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m tools.kv_bits", description=__doc__)
    parser.add_argument("--windows", type=int, default=32, help="texts of 1,024 tokens")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each speed")
    options = parser.parse_args()
    backend = MlxBackend()
    backend.open()
    print_quality(backend, options.windows)
    print_speed(backend, options.rounds)
    backend.close()


def print_quality(backend: MlxBackend, count: int) -> None:
    """Print perplexities, and for how long greedy texts stay those of plain caches."""
    expected: list[list[int]] = []
    for bits in BITS:
        model: Any = backend.load(LoadSpec(str(DEMO), kv_bits=bits), _ignore)
        windows = _windows(model, count)
        loss = statistics.fmean(_loss(model, window) for window in windows)
        texts = [_greedy(model, window[:_PROMPT_TOKENS]) for window in windows]
        expected = expected or texts
        common = [_common(*pair) for pair in zip(texts, expected, strict=True)]
        click.echo(
            f"{bits or 32} bits: perplexity {math.exp(loss):.4f}, same first tokens: median "
            f"{statistics.median(common):g}, all {_GREEDY_TOKENS} in "
            f"{common.count(_GREEDY_TOKENS)} of {len(windows)} texts"
        )


def _windows(model: Any, count: int) -> list[list[int]]:
    """Return texts of ``_WINDOW`` tokens, cut from the modules."""
    held = [source.text for source in collect() if source.held_out]
    ids = [model.codec.encode(text, as_prompt=True) for text in held]
    cut = [each[at : at + _WINDOW] for each in ids for at in range(0, len(each), _WINDOW)]
    return [window for window in cut if len(window) == _WINDOW][:count]


def _loss(model: Any, ids: Sequence[int]) -> float:
    """Return the mean negative log likelihood of a text that is prefilled in chunks, in nats."""
    run, caches, losses = model._model, model._pieces.new(), []  # noqa: SLF001
    for begin in range(0, len(ids) - 1, _CHUNK):
        targets = mx.array(list(ids[begin + 1 : begin + 1 + _CHUNK]))
        logits = run(mx.array([list(ids[begin : begin + targets.size])]), cache=caches)[0]
        chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        losses.append(mx.sum(mx.logsumexp(logits, axis=-1) - chosen))
    return cast("float", sum(losses, mx.array(0.0)).item()) / (len(ids) - 1)


def _greedy(model: Any, prompt: Sequence[int]) -> list[int]:
    executor = start_alone(model, prompt, Sampling(temperature=0))
    tokens: list[Token] = decode_with_drafts(executor, _GREEDY_TOKENS, lambda _done: ())[0]
    return [token.token_id for token in tokens]


def _common(some: Sequence[int], others: Sequence[int]) -> int:
    pairs = enumerate(zip(some, others, strict=True))
    return next((index for index, (a, b) in pairs if a != b), len(some))


def print_speed(backend: MlxBackend, rounds: int) -> None:
    """Print the times of each number of bits, and their ratio to plain caches."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder), scaled("llama", **_SIZES))
        models = {bits: backend.load(_spec(path, bits), _ignore) for bits in BITS}
        for tokens in _SPEED_TOKENS:
            for name, rows, count in (("step", 1, 1), ("step of 4 rows", 4, 1), ("chunk", 1, 128)):
                runs = {bits: _run(models[bits], tokens, rows, count) for bits in BITS}
                taken = _taken(runs, rounds)
                plain = statistics.median(taken[0])
                ratios = ", ".join(
                    f"{bits} bits {statistics.median(taken[bits]) / plain:.2f}" for bits in BITS[1:]
                )
                click.echo(
                    f"{name} after {tokens:,} tokens: {plain * 1e3:.1f} ms; times plain: {ratios}"
                )


def _spec(path: Path, bits: int) -> LoadSpec:
    return LoadSpec(str(path), kv_bits=bits, context_length=40_000, prefix_cache_bytes=0)


def _run(model: Any, tokens: int, rows: int, count: int) -> Callable[[], None]:
    """Return a function that passes ``count`` tokens of each row, after ``tokens`` others."""
    caches = [model._pieces.new() for _ in range(rows)]  # noqa: SLF001
    for cache in (layer for own in caches for layer in own):
        keys, values = (mx.random.normal((1, 4, tokens, 64)) for _ in range(2))
        is_plain = not model.info.kv_bits
        parts = (keys, values) if is_plain else quantized(keys, values, 64, model.info.kv_bits)
        mx.eval(parts)
        fill(cache, parts, tokens)
    batch = caches[0] if rows == 1 else merge(caches, rows)
    inputs = mx.ones((rows, count), dtype=mx.int32)

    def run() -> None:
        mx.eval(model._model(inputs, cache=batch), [cache.state for cache in batch])  # noqa: SLF001

    return run


def _taken(runs: dict[int, Callable[[], None]], rounds: int) -> dict[int, list[float]]:
    """Return the CPU seconds of each function, called in turn after a warm-up."""
    taken: dict[int, list[float]] = {bits: [] for bits in runs}
    for index in range(rounds + 1):
        for bits, run in runs.items():
            began = time.process_time()
            run()
            if index:
                taken[bits].append(time.process_time() - began)
    return taken


def _ignore(_progress: int) -> None:
    """Ignore the progress of a load."""


if __name__ == "__main__":
    main()
