"""Real models behind a real server, for behaviour beyond the reach of the fake."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.engine import faults
from runner_server.engine.work import WorkItem
from runner_server.mlx_backend import MlxBackend
from support.embedding_models import say_that_it_embeds
from support.harness import Server, eventually, failure, joined, running, tokens

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend.executor import MlxExecutor  # noqa: E402
from runner_server.mlx_backend.loading.mlx_model import MlxModel  # noqa: E402

Build = Callable[..., Path]
UNLOAD = pb.UnloadRequest()
TOLERANCE_BYTES = 4096


@pytest.fixture
async def real(socket_dir: Path) -> AsyncIterator[Server]:
    """A server with MLX on the engine thread."""
    backend: Any = MlxBackend()
    async with running(socket_dir, backend) as (app, channel, ready):
        yield Server(app, backend, channel, ready)


def _held() -> int:
    return int(mx.get_active_memory() + mx.get_cache_memory())


async def test_unloading_frees_the_memory_of_each_model(real: Server, model_dir: Build) -> None:
    await real.stub.Unload(UNLOAD)
    before = _held()
    for kind in ({}, {"shape": "gemma3"}, {"quantize_bits": 4, "dtype": "bfloat16"}):
        await real.load(str(model_dir(**kind)))
        calls = [real.start(f"text {i}", num_predict=20, logprobs=i % 3) for i in range(6)]
        for call in calls:
            assert [message async for message in call][-1].eval_count <= 20
        await real.stub.Unload(UNLOAD)
        assert _held() <= before + TOLERANCE_BYTES
        assert (await real.status()).memory == _held()


async def test_joined_log_probability_texts_equal_the_content(
    real: Server, model_dir: Build
) -> None:
    """Random weights generate invalid bytes, and bytes which join to characters."""
    await real.load(str(model_dir()))
    for seed in range(6):
        messages = await real.complete("日本", logprobs=3, num_predict=60, seed=seed, top_k=0)
        entries = [entry for message in messages for entry in message.logprobs]
        assert "".join(entry.text for entry in entries) == joined(messages)
        data = b"".join(entry.bytes for entry in entries)
        assert data.decode(errors="replace") == joined(messages)
        for entry in entries:
            twins = [top for top in entry.top if top.token_id == entry.token_id]
            assert all((top.text, top.bytes) == (entry.text, entry.bytes) for top in twins)


@pytest.mark.parametrize("shape", ["llama", "gemma3", "mamba2"])
async def test_the_kv_figures_are_those_of_the_model(
    real: Server, model_dir: Build, shape: str
) -> None:
    """A window and a recurrent state count in sequences of full length."""
    await real.load(str(model_dir(shape)), context_length=1024, parallel=3)
    assert (await real.status()).kv_token_capacity == 3 * 1024
    # A text that hardly repeats itself, because drafts could end it before the status.
    varied: dict[str, Any] = {"temperature": 2, "top_k": 0, "logit_bias": {0: -100}}
    call = real.start("abcdef", num_predict=1000, **varied)
    await anext(aiter(call))
    assert 0 < (await real.status()).kv_token_count < 1024
    call.cancel()
    await eventually(lambda: not real.view.requests)
    assert (await real.status()).kv_token_count == 0


async def test_the_share_of_cached_prompts_is_counted(real: Server, model_dir: Build) -> None:
    await real.load(str(model_dir()), context_length=256)
    prompt = "def main(): pass " * 8
    first = (await real.complete(prompt, num_predict=2))[-1]
    assert (await real.status()).prefix_cached_ratio == 0
    again = (await real.complete(prompt, num_predict=2))[-1]
    assert again.prompt_cached_count > 0
    share = again.prompt_cached_count / (first.prompt_eval_count + again.prompt_eval_count)
    assert (await real.status()).prefix_cached_ratio == pytest.approx(share)
    await real.load(str(model_dir()), context_length=256)
    assert (await real.status()).prefix_cached_ratio == 0


async def test_a_request_bypasses_the_prefix_cache(real: Server, model_dir: Build) -> None:
    await real.load(str(model_dir()), context_length=256)
    prompt = "def main(): pass " * 8

    async def cached(**fields: Any) -> int:
        last = (await real.complete(prompt, num_predict=2, **fields))[-1]
        assert last.done
        return last.prompt_cached_count

    assert await cached(bypass_prefix_cache=True) == 0
    assert (await real.status()).memory_usage.prefix_cache_bytes == 0
    assert await cached() == 0
    assert await cached() > 0
    assert await cached(bypass_prefix_cache=True) == 0


async def test_salts_share_no_entries(real: Server, model_dir: Build) -> None:
    await real.load(str(model_dir()), context_length=256)
    prompt = "def main(): pass " * 8

    async def cached(salt: str) -> int:
        fields: dict[str, Any] = {"num_predict": 2, "temperature": 0, "cache_salt": salt}
        return (await real.complete(prompt, **fields))[-1].prompt_cached_count

    reused = {salt: [await cached(salt), await cached(salt)] for salt in ("", "a", "b")}
    assert [counts[0] for counts in reused.values()] == [0, 0, 0]
    assert all(counts[1] > 0 for counts in reused.values())


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer.json"])
async def test_a_broken_model_leaves_no_memory_in_use_and_the_server_works(
    real: Server, model_dir: Build, tmp_path: Path, broken: str
) -> None:
    await real.stub.Unload(UNLOAD)
    before = _held()
    path = Path(shutil.copytree(model_dir(), tmp_path / "broken"))
    (path / broken).write_text("{")
    problem = await failure(real.load(str(path)))
    assert problem.reason == "MODEL_UNSUPPORTED"
    assert problem.metadata == {"model": str(path)}
    assert "tokenizer" in problem.message or broken.split(".")[1] in problem.message
    assert _held() <= before + TOLERANCE_BYTES
    assert (await real.status()).state == pb.STATE_IDLE
    await real.load(str(model_dir()))
    assert len(tokens(await real.complete(num_predict=4, logit_bias={0: -100}))) == 4


async def test_a_load_that_fails_late_frees_its_memory(
    real: Server, model_dir: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The traceback once held the weights until the error had been answered."""
    await real.stub.Unload(UNLOAD)
    before = _held()

    def broken(_model: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(MlxModel, "warm_up", broken)
    # pytest keeps log records, and with them the traceback.
    monkeypatch.setattr(faults.logger, "disabled", True)
    problem = await failure(real.load(str(model_dir())))
    assert problem.reason == "GENERATION_FAILED"
    assert _held() <= before + TOLERANCE_BYTES


async def test_a_load_beyond_the_memory_limit_is_refused(real: Server, model_dir: Build) -> None:
    problem = await failure(real.load(str(model_dir()), memory_limit_bytes=1000))
    assert problem.reason == "INSUFFICIENT_MEMORY"
    assert problem.metadata["availableBytes"] == "1000"
    assert int(problem.metadata["requiredBytes"]) > 400_000


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"model": "/nowhere"}, "MODEL_NOT_FOUND"),
        ({"context_length": 1 << 20}, "INVALID_FIELD"),
    ],
)
async def test_a_load_that_its_files_rule_out_keeps_the_loaded_model(
    real: Server, model_dir: Build, request_: dict[str, Any], reason: str
) -> None:
    path = str(model_dir())
    await real.load(path)
    problem = await failure(real.load(**{"model": path, **request_}))
    assert problem.reason == reason
    assert await real.text("still there", num_predict=2, temperature=0)


async def test_a_cancelled_load_frees_its_memory(
    real: Server, model_dir: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    await real.stub.Unload(UNLOAD)
    before = _held()
    reached, go = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    warm_up = MlxModel.warm_up

    def waiting(model: Any) -> None:
        loop.call_soon_threadsafe(reached.set)
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result()
        warm_up(model)

    monkeypatch.setattr(MlxModel, "warm_up", waiting)
    load = real.stub.Load(pb.LoadRequest(model=str(model_dir())))
    await reached.wait()
    assert _held() > before + 400_000
    command = real.view.model_command
    assert command
    load.cancel()
    await asyncio.to_thread(command.cancelled.wait)
    go.set()
    await asyncio.to_thread(lambda: command.future.exception(20))
    assert _held() <= before + TOLERANCE_BYTES
    await real.load(str(model_dir()))
    assert await real.text(num_predict=3, temperature=0)


async def test_the_server_survives_a_failing_step(
    real: Server, model_dir: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    await real.load(str(model_dir()), parallel=2)
    expected = await real.text(temperature=0.0, num_predict=10)
    run, left = MlxExecutor.run, [1]

    def broken(executor: MlxExecutor, item: WorkItem) -> Any:
        report = run(executor, item)
        if left:
            left.pop()
            raise RuntimeError("in a step")
        return report

    monkeypatch.setattr(MlxExecutor, "run", broken)
    assert (await failure(real.start())).reason == "GENERATION_FAILED"
    assert await real.text(temperature=0.0, num_predict=10) == expected


async def test_text_and_tokens_agree_with_the_tokenizer(real: Server, model_dir: Build) -> None:
    await real.load(str(model_dir()))
    for seed in range(4):
        # Random weights generate arbitrary bytes.
        messages = await real.complete("naïve 日本", seed=seed, temperature=2.0, num_predict=60)
        ids = [id_ for id_ in tokens(messages) if id_ != 0]
        answer = await real.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))
        assert joined(messages) == answer.content


async def test_the_context_length_is_enforced(real: Server, model_dir: Build) -> None:
    await real.load(str(model_dir()), context_length=24)
    prompt = pb.TokenIds(ids=[5] * 20)
    options = pb.CompletionOptions(num_predict=100, logit_bias={0: -100})
    request = pb.CompletionRequest(prompt_token_ids=prompt, options=options)
    last = [message async for message in real.stub.Completion(request)][-1]
    assert (last.eval_count, last.done_reason) == (4, pb.DONE_REASON_LENGTH)
    request.prompt_token_ids.ids.extend([5] * 4)
    assert (await failure(real.stub.Completion(request))).reason == "PROMPT_TOO_LONG"


async def test_stop_penalties_and_bias_apply_per_row(real: Server, model_dir: Build) -> None:
    await real.load(str(model_dir()), parallel=8)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "stop": ["e", " "]},
        {"temperature": 0.0, "repeat_penalty": 1.4},
        {"temperature": 0.0, "logit_bias": {7: 90.0}},
        {"seed": 1},
        {"seed": 1, "stop": ["a"]},
    ]
    base = {"num_predict": 30}
    alone = [await real.text("one prompt", **{**base, **kind}) for kind in kinds]
    calls = [real.start("one prompt", **{**base, **kind}) for kind in kinds]
    together = [joined([message async for message in call]) for call in calls]
    assert together[3] == alone[3]
    for kind, text in zip(kinds, together, strict=True):
        assert not any(stop in text for stop in kind.get("stop", []))
    assert together[0].startswith(together[1])
    assert together[4].startswith(together[5])


async def test_unload_ends_running_requests_and_frees_their_memory(
    real: Server, model_dir: Build
) -> None:
    await real.stub.Unload(UNLOAD)
    before = _held()
    await real.load(str(model_dir()), parallel=2)
    calls = [real.start("x" * 50, num_predict=2000, logit_bias={0: -100}) for _ in range(4)]
    await anext(aiter(calls[0]))
    # A request arriving after the unload would fail because no model is loaded.
    await eventually(lambda: real.view.request_count == 4)
    await real.stub.Unload(UNLOAD)
    for call in calls[1:]:
        assert (await failure(call)).reason == "SHUTTING_DOWN"
    assert _held() <= before + TOLERANCE_BYTES


async def test_texts_are_embedded_beside_streams_and_freed(real: Server, model_dir: Build) -> None:
    path = say_that_it_embeds(model_dir(), {"pooling_mode": "mean"})
    try:
        await real.load(str(path), context_length=512)
    finally:
        (path / "modules.json").unlink()
    texts = [f"{word} " * 40 for word in ("fox", "dog", "naïve", "日本語")]
    request = pb.EmbedRequest(inputs=[pb.EmbedInput(text=text) for text in texts])
    alone = await real.stub.Embed(request)
    assert [len(each.values) for each in alone.embeddings] == [64] * 4
    lengths = [sum(value * value for value in each.values) for each in alone.embeddings]
    assert lengths == pytest.approx([1] * 4, abs=1e-5)
    expected = [tokens(m) for m in (await real.complete("fox", num_predict=30, seed=1),)]
    stream = real.start("fox", num_predict=30, seed=1)
    answers = await asyncio.gather(*(real.stub.Embed(request) for _ in range(6)))
    assert [tokens([message async for message in stream])] == expected
    for answer in answers:
        for one, other in zip(answer.embeddings, alone.embeddings, strict=True):
            assert list(one.values) == pytest.approx(list(other.values), abs=2e-5)
