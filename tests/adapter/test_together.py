"""Models with wrong results in a batch run one row at a time, with a warning; others batch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.engine.backend import LoadedModel
from runner_server.errors import ModelUnsupported
from runner_server.mlx_backend import MlxBackend
from support.harness import Server, running, tokens
from support.rows import Row, run_alone, run_rows
from support.sweeps import sampled
from tools.local_batch import LocalBatch
from tools.memory.models import scaled, write_model

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend.cache.row_caches import CachePieces  # noqa: E402
from runner_server.mlx_backend.loading import batch_trial  # noqa: E402
from runner_server.mlx_backend.planning import working_memory  # noqa: E402

Load = Callable[..., LoadedModel]

ROUNDING = 1e-4
"""Difference that float32 rounding may make, in standard deviations of the logits."""


def _deviation(model: Any) -> float:
    return batch_trial.deviation(model._model, model._pieces, model.info.vocab_size, 3)


def test_rounding_stays_far_below_the_tolerance(trained: LoadedModel, tiny: LoadedModel) -> None:
    assert _deviation(trained) < ROUNDING
    assert _deviation(tiny) < ROUNDING
    assert trained.info.parallel == tiny.info.parallel == 8
    assert trained.info.warnings == tiny.info.warnings == ()


def test_a_model_that_counts_padding_runs_alone(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In afm7, keys take the offset of the longest row: different tokens, without an error."""
    monkeypatch.delitem(working_memory._KNOWN_ALONE, "afm7")
    model = load(write_model(tmp_path, scaled("afm7")), parallel=4)
    assert model.info.parallel == 1
    (warning,) = model.info.warnings
    assert "one after another" in warning
    assert "'afm7'" in warning
    assert "logits differ" in warning


@pytest.mark.parametrize("rows", [2, 4])
def test_a_model_that_raises_in_a_batch_runs_alone(
    load: Load, model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    def broken(_rows: object, _capacity: int) -> Any:
        raise ValueError("[broadcast_shapes] no")

    monkeypatch.setattr(batch_trial, "merge", broken)
    info = load(model_dir(), parallel=rows).info
    assert info.parallel == 1
    assert "ValueError: [broadcast_shapes] no" in info.warnings[0]


@pytest.mark.parametrize("lengths", [(1, 2, 3, 9), (9, 1, 2, 3), (2, 1)])
def test_short_prompts_batch_where_states_hold_the_last_tokens(
    tmp_path: Path, load: Load, lengths: tuple[int, ...]
) -> None:
    """N-gram contexts of one to three tokens once overwrote the contexts of longer rows."""
    config = scaled("longcat_flash_ngram", emb_neighbor_num=5)
    model = load(write_model(tmp_path, config), parallel=4, prefix_cache_bytes=0)
    assert model.info.parallel == 4
    rows = [
        Row([7 + 3 * position + row for position in range(length)], 12, late=row // 2)
        for row, length in enumerate(lengths)
    ]
    assert run_rows(LocalBatch.of(model), rows) == [run_alone(model, row) for row in rows]


def test_the_batch_trial_leaves_no_memory_in_use(trained: LoadedModel) -> None:
    model: Any = trained
    before = mx.get_active_memory()
    assert batch_trial.try_together(model._model, CachePieces.of(model._model), 2048, 4) is None
    assert mx.get_active_memory() == before


@pytest.fixture
async def server(socket_dir: Path) -> AsyncIterator[Server]:
    """A server with MLX on the engine thread."""
    backend: Any = MlxBackend()
    async with running(socket_dir, backend) as (app, channel, ready):
        yield Server(app, backend, channel, ready)


@pytest.mark.parametrize(
    "model_type",
    sampled(["gemma2", "llama4", "recurrent_gemma", "deepseek_v41"], ["gemma2", "llama4"]),
)
async def test_concurrent_requests_are_served_one_after_another(
    server: Server, tmp_path: Path, model_type: str
) -> None:
    """Some of these types once ended the process with exit code 70, others were refused."""
    path = write_model(tmp_path, scaled(model_type))
    loaded = await server.stub.Load(pb.LoadRequest(model=str(path), parallel=8))
    assert any("one after another" in text for text in loaded.model.warnings)
    assert (await server.status()).parallel == 1

    async def ask(row: int) -> list[int]:
        options: dict[str, Any] = {"num_predict": 6, "temperature": 0}
        return tokens(await server.complete("abc"[: 1 + row % 3] * (1 + row), **options))

    one_by_one = [await ask(row) for row in range(8)]
    assert await asyncio.gather(*(ask(row) for row in range(8))) == one_by_one
    assert (await server.status()).state == pb.STATE_ACTIVE


@pytest.mark.skipif(mx.metal.is_available(), reason="Metal runs its kernels")
def test_a_model_without_kernels_for_this_device_is_refused_with_a_clear_error(
    tmp_path: Path, load: Load
) -> None:
    """The load once raised an error whose answer suggested a retry."""
    path = write_model(tmp_path, {**scaled("llama"), "model_type": "bitnet"})
    with pytest.raises(ModelUnsupported, match=r"cannot run .* on this device .*Metal"):
        load(path)
