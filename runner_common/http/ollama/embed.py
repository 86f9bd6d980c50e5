"""``POST /api/embed`` and ``POST /api/embeddings``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.http.ollama.hosting import check_keep_alive, hosted_name, on_accept, ready
from runner_common.http.ollama.translation.answers import Stopwatch
from runner_common.http.ollama.translation.embeddings import (
    read_embed,
    read_old_embedding,
    unit_vector,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runner_common.http.body import JsonObject
    from runner_common.http.exchange import Exchange
    from runner_common.http.host import Host
    from runner_common.http.ollama.translation.embeddings import Embedding

_BATCH = 64
"""Texts of one call to the runner. Vectors of up to 16,384 numbers then fit a message; the original
has no limit on the texts of a request."""


async def embed(host: Host, exchange: Exchange, body: JsonObject) -> None:
    """Return the vectors of texts, of length 1."""
    wanted, stopwatch = read_embed(body), Stopwatch()
    vectors, token_count = await _vectors(host, exchange, wanted, stopwatch)
    answer = {
        "model": wanted.model,
        "embeddings": [unit_vector(vector, wanted.dimensions) for vector in vectors],
        "total_duration": stopwatch.total_duration,
        "load_duration": stopwatch.load_duration,
        "prompt_eval_count": token_count,
    }
    await exchange.send_json(answer)


async def old_embed(host: Host, exchange: Exchange, body: JsonObject) -> None:
    """Return the vector of a text without scaling."""
    vectors, _ = await _vectors(host, exchange, read_old_embedding(body), Stopwatch())
    await exchange.send_json({"embedding": list(vectors[0]) if vectors else []})


async def _vectors(
    host: Host, exchange: Exchange, wanted: Embedding, stopwatch: Stopwatch
) -> tuple[list[Sequence[float]], int]:
    """Return the vectors of the texts, and the number of tokens."""
    check_keep_alive(host, exchange, wanted)
    model = await hosted_name(host, exchange, wanted.model)
    if wanted.num_ctx is not None or not wanted.texts:
        await ready(host, exchange, wanted, model)
    if not wanted.texts:
        await on_accept(host, wanted, model)()
        return [], 0
    vectors: list[Sequence[float]] = []
    token_count = 0
    for start in range(0, len(wanted.texts), _BATCH):
        inputs = [pb.EmbedInput(text=text) for text in wanted.texts[start : start + _BATCH]]
        request = pb.EmbedRequest(inputs=inputs, model=model)
        is_last = start + _BATCH >= len(wanted.texts)
        # Before the last one the model must not be unloaded.
        now_wanted = wanted if is_last else replace(wanted, keep_alive=None)
        accept = on_accept(host, now_wanted, model, stopwatch)
        found = await host.embed(request, exchange.call.accepting(accept))
        vectors += (each.values for each in found.embeddings)
        token_count += found.prompt_eval_count
    return vectors, token_count
