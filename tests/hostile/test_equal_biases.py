"""Equal biases for a whole vocabulary, on a server of their own.

Not beside the servers of ``conftest``: MLX may hang if one engine of a process clears the cache
while another one reads weights. ``mx.clear_cache`` holds the GIL while it waits for every stream,
and a stream needs the GIL to drop the reader of a file.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from hostile.conftest import CONTEXT_LENGTH
from support.harness import Server, running

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend import MlxBackend

pytestmark = pytest.mark.mlx

VOCAB_SIZE = 512


@pytest.fixture
async def small(model_dir: Callable[..., Path], socket_dir: Path) -> AsyncIterator[Server]:
    """A server with a model whose whole vocabulary fits ``logit_bias``."""
    backend: Any = MlxBackend()
    async with running(socket_dir, backend) as (app, channel, ready):
        server = Server(app, backend, channel, ready)
        info = await server.load(str(model_dir()), context_length=CONTEXT_LENGTH)
        assert info.model.vocab_size == VOCAB_SIZE
        yield server


@pytest.mark.parametrize("value", [-100.0, 100.0, -0.0, 1.4e-45])
async def test_equal_biases_for_all_tokens_change_nothing(small: Server, value: float) -> None:
    """Compare equal biases for all tokens with none, and a different one for one token."""
    options: dict[str, Any] = {"temperature": 0.0, "num_predict": 12}
    whole = dict.fromkeys(range(VOCAB_SIZE), value)
    plain = await small.text("def", **options)
    assert await small.text("def", logit_bias=whole, **options) == plain
    if value < 0:
        options["temperature"] = 1.0
        last = (await small.complete("def", logit_bias=whole | {65: 100.0}, **options))[-1]
        assert last.eval_count == 12
