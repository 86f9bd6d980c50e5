"""NaN or infinite logits end the affected row, or the load, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.engine.backend import LoadedModel
from runner_server.engine.types import Dtype, NotFinite, Sampling, Token
from runner_server.errors import ModelUnsupported
from runner_server.mlx_backend import MlxBackend
from support.harness import Problem, Server, failure, running, tokens
from support.rows import GREEDY, Row
from tools.local_batch import LocalBatch

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend.sampling.logprobs import are_finite  # noqa: E402

Build = Callable[..., Path]
Load = Callable[..., LoadedModel]

POISON = 300
"""Token with NaN in its embedding; the output layer is separate, so other tokens are unaffected."""

BEGINNING = [1 + i % 90 for i in range(70)]
MIB = 1 << 20

SAMPLINGS = {
    "greedy": GREEDY,
    "sampled": Sampling(seed=1),
    "min_p": Sampling(seed=1, top_k=0, top_p=1.0, min_p=0.1),
    "nucleus": Sampling(seed=1, top_k=0, top_p=0.9),
    "logprobs": Sampling(seed=1, logprobs=5),
}


def _changed(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    file = path / "model.safetensors"
    weights = dict(mx.load(str(file)))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(file), weights)
    return path


def _poison(weights: dict[str, Any]) -> None:
    (name,) = (name for name in weights if "embed" in name)
    weights[name][POISON] = mx.nan


@pytest.fixture(scope="module")
def poisoned_dir(model_dir: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with NaN in the embedding of one token."""
    sound = model_dir(tie_word_embeddings=False)
    return _changed(Path(shutil.copytree(sound, tmp_path_factory.mktemp("m") / "m")), _poison)


@pytest.fixture(scope="module")
def poisoned(load: Load, poisoned_dir: Path) -> LoadedModel:
    return load(poisoned_dir, parallel=8, prefix_cache_bytes=8 * MIB)


def _run(batch: LocalBatch, rows: Sequence[Row]) -> list[int]:
    """Run rows to completion; return the rows that failed."""
    failed: list[int] = []
    active = dict(enumerate(rows))
    for id_, row in active.items():
        batch.add(id_, row.prompt, row.sampling)
    while active:
        ended = set()
        for event in batch.step():
            row = active[event.row]
            if isinstance(event, NotFinite):
                failed.append(event.row)
                ended.add(event.row)
            elif isinstance(event, Token):
                row.ids.append(event.token_id)
                if event.logprob:
                    row.logprobs.append(event.logprob)
                if len(row.ids) == row.count:
                    ended.add(event.row)
        batch.remove(ended)
        for id_ in ended:
            del active[id_]
    return failed


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_a_row_with_nan_logits_is_reported(poisoned: LoadedModel, sampling: Sampling) -> None:
    row = Row([1, 2, POISON, 3], 8, sampling)
    assert _run(LocalBatch.of(poisoned), [row]) == [0]
    assert row.ids == []


def test_neighbours_of_a_broken_row_are_unaffected(poisoned: LoadedModel) -> None:
    """Results are equal bit by bit, since the broken row leaves like a row of one token."""
    with_logprobs = replace(GREEDY, logprobs=5)

    def neighbours() -> list[Row]:
        return [Row([5 + row, 6, 7, 8 + row], 12, with_logprobs) for row in range(3)]

    broken, sound = neighbours(), neighbours()
    assert _run(LocalBatch.of(poisoned), [*broken, Row([4, POISON, 2, 1], 1)]) == [3]
    assert _run(LocalBatch.of(poisoned), [*sound, Row([4, 3, 2, 1], 1)]) == []
    assert [(row.ids, row.logprobs) for row in broken] == [(row.ids, row.logprobs) for row in sound]


def test_a_generated_token_can_break_the_next_step(poisoned: LoadedModel) -> None:
    forced = replace(GREEDY, logit_bias=((POISON, 1000.0),))
    row = Row([1, 2, 3], 8, forced)
    assert _run(LocalBatch.of(poisoned), [row, Row([3, 2, 1], 8)]) == [0]
    assert row.ids == [POISON]


@pytest.mark.parametrize("shape", ["llama", "gemma3", "mamba2"])
def test_the_prefix_cache_keeps_nothing_from_a_broken_row(
    load: Load, model_dir: Build, tmp_path: Path, shape: str
) -> None:
    sound = model_dir(shape, tie_word_embeddings=False)
    path = _changed(Path(shutil.copytree(sound, tmp_path / "m")), _poison)
    model: Any = load(path, prefix_cache_bytes=8 * MIB)
    assert _run(LocalBatch.of(model), [Row([*BEGINNING, 200, 201], 2)]) == []
    broken = [*BEGINNING, *[POISON] * 40, 7, 8]
    for _ in range(2):
        assert _run(LocalBatch.of(model), [Row(broken, 2)]) == [0]
        assert model._prompts.match(broken).common <= len(BEGINNING)
    # The beginning shared with a sound prompt stays cached.
    assert model._prompts.match([*BEGINNING, 9]).common == len(BEGINNING)


def test_a_row_that_ends_before_its_failure_is_seen_leaves_nothing(
    poisoned: LoadedModel,
) -> None:
    """The keys of the last token are computed before its successor is known to be invalid."""
    model: Any = poisoned
    prompt = [90, 91, 92]
    forced = replace(GREEDY, logit_bias=((POISON, 1000.0),))
    assert _run(LocalBatch.of(model), [Row(prompt, 1, forced)]) == []
    assert model._prompts.match([*prompt, POISON]).common <= len(prompt)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("index", [0, 7, 1999])
def test_are_finite_rejects_nan_and_infinity_but_not_banned_tokens(dtype: str, index: int) -> None:
    def row(value: float) -> list[float]:
        return [*[200.0] * index, value, *[200.0] * (1999 - index)]

    values = [1.0, float("nan"), float("inf"), float("-inf")]
    logits = mx.array([row(value) for value in values]).astype(getattr(mx, dtype))
    drawn = mx.array([index, 2**31, 2**31, (index + 1) % 2000], dtype=mx.uint32)
    # A single -inf, as in the last row, only bars a token.
    assert are_finite(logits, drawn).tolist() == [True, False, False, True]


def _bar_all(weights: dict[str, Any]) -> None:
    """Make every logit after ``POISON`` overflow to -inf, and keep logits after others finite."""
    for name in [name for name in weights if "o_proj" in name or "down_proj" in name]:
        weights[name] = mx.zeros_like(weights[name])
    (embedding,) = (weights[name] for name in weights if "embed" in name)
    embedding[:, 0] = 0.0
    embedding[POISON, 0] = 1000.0
    weights["model.norm.weight"][0] = 1000.0
    weights["lm_head.weight"][:, 0] = -60_000.0 if embedding.dtype == mx.float16 else -3e38


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_row_with_every_token_banned_is_reported(
    load: Load, model_dir: Build, tmp_path: Path, dtype: str
) -> None:
    sound = model_dir(tie_word_embeddings=False, dtype=dtype)
    path = _changed(Path(shutil.copytree(sound, tmp_path / "m")), _bar_all)
    model = load(path, parallel=8, dtype=Dtype.AS_STORED)
    samplings = SAMPLINGS.values()
    rows = [Row([1, POISON], 4, sampling) for sampling in samplings]
    assert _run(LocalBatch.of(model), [*rows, Row([1, 2], 4)]) == [*range(len(rows))]
    assert not any(row.ids for row in rows)


@pytest.fixture
async def server(socket_dir: Path) -> AsyncIterator[Server]:
    """A server with MLX on the engine thread."""
    backend: Any = MlxBackend()
    async with running(socket_dir, backend) as (app, channel, ready):
        yield Server(app, backend, channel, ready)


async def test_the_caller_gets_the_reason(server: Server, poisoned_dir: Path) -> None:
    await server.load(str(poisoned_dir))
    # Neither the end of text nor the broken token is sampled.
    beside = server.start(num_predict=30, logit_bias={0: -100.0, POISON: -100.0})
    request = pb.CompletionRequest(prompt_token_ids=pb.TokenIds(ids=[1, POISON, 3]))
    problem = await failure(server.stub.Completion(request))
    assert isinstance(problem, Problem)
    assert problem.reason == "GENERATION_FAILED"
    assert "logits are not finite" in problem.message
    assert "held as float32" in problem.message
    assert len(tokens([message async for message in beside])) == 30
    again = await server.complete(num_predict=4, logit_bias={0: -100.0, POISON: -100.0})
    assert len(tokens(again)) == 4
    status = await server.status()
    assert "not finite" in status.last_error
    assert status.running_count == status.queued_count == 0


def test_a_non_finite_weight_is_named_at_load(load: Load, model_dir: Build, tmp_path: Path) -> None:
    path = Path(shutil.copytree(model_dir(), tmp_path / "m"))

    def change(weights: dict[str, Any]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] = mx.inf

    with pytest.raises(ModelUnsupported, match=r"layers\.1\.mlp\.up_proj\.weight is not finite"):
        load(_changed(path, change))


def test_a_float16_overflow_is_refused_and_other_dtypes_work(
    load: Load, model_dir: Build, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(model_dir(), tmp_path / "m"))

    def change(weights: dict[str, Any]) -> None:
        weights.update({name: 300 * value for name, value in weights.items() if "mlp" in name})

    _changed(path, change)
    with pytest.raises(ModelUnsupported, match=r"held as float16.*load it with dtype float32"):
        load(path, dtype=Dtype.FLOAT16)
    for dtype in (Dtype.FLOAT32, Dtype.BFLOAT16):
        assert _run(LocalBatch.of(load(path, dtype=dtype)), [Row([1, 2, 3], 3)]) == []
