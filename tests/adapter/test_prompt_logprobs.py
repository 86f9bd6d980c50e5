"""Log probabilities of the prompt, compared with one pass over the whole prompt."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter.test_finite import POISON, poisoned, poisoned_dir
from mlxrunner.v1 import runner_pb2 as pb
from runner_server.engine.backend import LoadedModel
from runner_server.engine.logprobs import TokenLogprob
from runner_server.engine.types import CachePolicy, NotFinite, Prefill, Sampling, Token
from runner_server.mlx_backend import MlxBackend
from support.harness import Server, eventually, failure, joined, running
from support.prefix_bench import MakeBench
from support.rows import GREEDY
from tools.local_batch import LocalBatch

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

Load = Callable[..., LoadedModel]
Build = Callable[..., Path]

__all__ = ["poisoned", "poisoned_dir"]

ALONE = CachePolicy(reads=False)
"""The policy that a request with log probabilities of its prompt gets."""

SHAPES = ["llama", "gemma3", "lfm2", "mamba2"]
MIB = 1 << 20


def _prompt(length: int, seed: int = 1) -> list[int]:
    draw = random.Random(seed)  # noqa: S311 - prompts
    return [draw.randrange(1, 500) for _ in range(length)]


def run(
    model: LoadedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, max_logits: int = 20
) -> tuple[list[list[TokenLogprob]], list[list[int]], list[int]]:
    """Run prompts in one batch, with two tokens each beside other rows.

    Returns:
        The log probabilities of each prompt, the tokens generated, and the sizes of the chunks.
    """
    limits = replace(model.prefill_limits, max_logits=max_logits)
    batch = LocalBatch(model.new_executor(), limits)
    count = len(prompts)
    for row, prompt in enumerate(prompts):
        batch.add(row, prompt, sampling, ALONE)
        batch.add(count + row, _prompt(30 + row, 90 + row), GREEDY)
    found: list[list[TokenLogprob]] = [[] for _ in prompts]
    ids: list[list[int]] = [[] for _ in range(2 * count)]
    chunks = []
    while any(len(own) < 2 for own in ids):
        for event in batch.step():
            if isinstance(event, Token):
                ids[event.row].append(event.token_id)
            elif isinstance(event, Prefill) and event.logprobs:
                assert event.cached == 0
                assert not ids[event.row], "log probabilities after a token"
                chunks.append(len(event.logprobs.token_ids))
                found[event.row] += event.logprobs.entries()
    batch.close()
    return found, [own[:2] for own in ids[:count]], chunks


def expected(model: Any, prompt: Sequence[int]) -> Any:
    """Return the log probabilities after each token, from one pass over the whole prompt."""
    logits = model._model(mx.array([list(prompt)]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def assert_as_expected(found: Sequence[TokenLogprob], all_: Any, prompt: Sequence[int]) -> None:
    assert [entry.token_id for entry in found] == [*prompt[1:]]
    for entry, at in zip(found, all_, strict=False):
        assert entry.logprob == pytest.approx(at[entry.token_id], abs=2e-3)
        values = [value for _, value in entry.top]
        np.testing.assert_allclose(values, -np.sort(-at)[: len(values)], atol=2e-3)
        np.testing.assert_allclose(values, at[[id_ for id_, _ in entry.top]], atol=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("top", [0, 5])
def test_log_probabilities_are_those_of_one_pass(
    load: Load, model_dir: Build, shape: str, top: int
) -> None:
    """Prompts of one token, of less than a chunk, and of several chunks, beside other rows."""
    model = load(model_dir(shape), parallel=8)
    sampling = replace(GREEDY, prompt_logprobs=top)
    prompts = [_prompt(length, length) for length in (1, 2, 21, 75)]
    found, _, chunks = run(model, prompts, sampling)
    assert max(chunks) <= 20
    for own, prompt in zip(found, prompts, strict=True):
        assert all(len(entry.top) == top for entry in own)
        assert_as_expected(own, expected(model, prompt), prompt)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_cached_prompt_has_the_same_log_probabilities(make_bench: MakeBench, shape: str) -> None:
    """Nothing is taken from the cache; the prompt is stored there for others."""
    bench = make_bench(shape)
    prompt = _prompt(150)
    sampling = replace(GREEDY, prompt_logprobs=3)
    cold = bench.run(prompt, 3, sampling, ALONE)
    assert bench.run(prompt, 3).cached == len(prompt) - 1
    bench.counting.tokens = 0
    warm = bench.run(prompt, 3, sampling, ALONE)
    assert bench.counting.tokens >= len(prompt)
    assert (warm.cached, warm.ids) == (0, cold.ids)
    some, others = (
        [entry for event in result.progress if event.logprobs for entry in event.logprobs.entries()]
        for result in (cold, warm)
    )
    assert len(some) == len(prompt) - 1
    assert [entry.logprob for entry in some] == pytest.approx(
        [entry.logprob for entry in others], abs=2e-3
    )


def test_the_text_does_not_depend_on_the_log_probabilities(trained: LoadedModel) -> None:
    prompts = [
        trained.codec.encode(text, as_prompt=True)
        for text in ("def main(self):\n    self." * 4, "import os\nimport ")
    ]
    plain = run(trained, prompts, GREEDY)[1]
    scored = run(trained, prompts, replace(GREEDY, prompt_logprobs=1))[1]
    assert scored == plain


def test_logits_that_are_not_finite_end_the_row(poisoned: LoadedModel) -> None:
    """The bad token is in the middle of a prompt, after a sound chunk."""
    limits = replace(poisoned.prefill_limits, max_logits=4)
    batch = LocalBatch(poisoned.new_executor(), limits)
    prompt = [1, 2, 3, 4, 5, 6, POISON, 7, 8, 9, 10, 11]
    batch.add(0, prompt, replace(GREEDY, prompt_logprobs=1), ALONE)
    batch.add(1, [1, 2, 3], GREEDY)
    failed: set[int] = set()
    generated: list[int] = []
    scored: list[float] = []
    while len(generated) < 4:
        for event in batch.step():
            if isinstance(event, NotFinite):
                # A step of this batch may run several chunks of the row before it is removed.
                failed.add(event.row)
            elif isinstance(event, Token):
                generated.append(event.row)
            elif isinstance(event, Prefill) and event.logprobs:
                scored += [entry.logprob for entry in event.logprobs.entries()]
        batch.remove(failed)
    batch.close()
    assert failed == {0}
    assert set(generated) == {1}
    assert len(scored) <= 4
    assert np.isfinite(scored).all()


async def test_a_request_whose_prompt_has_bad_logits_fails(
    socket_dir: Path, poisoned_dir: Path
) -> None:
    backend: Any = MlxBackend()
    async with running(socket_dir, backend) as (app, channel, ready):
        server = Server(app, backend, channel, ready)
        await server.load(str(poisoned_dir), parallel=2)
        ids = [1, 2, POISON, 3, 4]
        for top in (0, 3):
            request = pb.CompletionRequest(
                prompt_token_ids=pb.TokenIds(ids=ids), prompt_logprobs=top
            )
            problem = await failure(server.stub.Completion(request))
            assert problem.reason == "GENERATION_FAILED"
            assert "not finite" in problem.message
        assert await server.text("fine", num_predict=3, prompt_logprobs=1, seed=1)
        await eventually(lambda: not server.view.requests)


@pytest.mark.parametrize("vocab_size", [2048, 60_000])
def test_the_logits_fit_the_planned_memory(load: Load, model_dir: Build, vocab_size: int) -> None:
    """The logits of the whole prompt would take 180 MB at the larger vocabulary."""
    model: Any = load(
        model_dir(vocab_size=vocab_size), parallel=2, context_length=800, prefix_cache_bytes=0
    )
    limit = model.prefill_limits.max_logits
    assert 1 <= limit < 800
    prompts = [_prompt(750)]
    sampling = replace(GREEDY, prompt_logprobs=20)
    run(model, [_prompt(limit + 2)], sampling, limit)  # compiles kernels
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    found, _, chunks = run(model, prompts, sampling, limit)
    plan = model._plan
    assert max(chunks) <= limit
    assert len(found[0]) == 749
    assert mx.get_peak_memory() - before <= plan.need.working_bytes + plan.need.kv_bytes


async def test_the_log_probabilities_of_a_text_go_through_the_server(demo: Server) -> None:
    text = "def read_lines(path):\n    return naïve"
    plain = await demo.complete(text, temperature=0, num_predict=8)
    calls = [demo.start(text, temperature=0, num_predict=8, prompt_logprobs=2) for _ in range(2)]
    for call in calls:
        messages = [message async for message in call]
        assert joined(messages) == joined(plain)
        assert messages[-1].prompt_cached_count == 0
        entries = [entry for message in messages for entry in message.prompt_logprobs]
        ids = list((await demo.stub.Tokenize(pb.TokenizeRequest(content=text))).token_ids)
        assert [entry.token_id for entry in entries] == ids[1:]
        first = pb.DetokenizeRequest(token_ids=ids[:1])
        begin = (await demo.stub.Detokenize(first)).content
        assert begin + "".join(entry.text for entry in entries) == text
        assert begin.encode() + b"".join(entry.bytes for entry in entries) == text.encode()
        assert all(len(entry.top) == 2 for entry in entries)
        assert all(-60 < entry.logprob <= 0 for entry in entries)
