"""Fixtures with real models in this process; tests are skipped without mlx."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from runner_server.engine.backend import LoadedModel
from runner_server.engine.types import LoadSpec
from runner_server.mlx_backend import MlxBackend
from support.harness import Server, running
from support.mlx_tasks import assert_no_tasks_left

if TYPE_CHECKING:
    from support.prefix_bench import Bench, MakeBench

Load = Callable[..., LoadedModel]
DEMO = Path(__file__).parents[2] / "runner_server/demo/model"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder with ``mlx``."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.mlx)


@pytest.fixture(scope="session")
def backend() -> Iterator[MlxBackend]:
    """The MLX backend, opened on the thread of the tests.

    One thread multiplies, whichever model was loaded last: small models are slower with two, and
    here several models share the process.
    """
    backend = MlxBackend()
    backend.open()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runner_server.mlx_backend.loading.loader.fit_threads", _one_thread)
        yield backend
    backend.close()


def _one_thread(_weights: object) -> None:
    from runner_server.mlx_backend.blas_threads import limit_threads

    limit_threads(1)


@pytest.fixture(scope="session")
def load(backend: MlxBackend) -> Load:
    """Load a model from a directory; further arguments go to ``LoadSpec``."""

    def load_(path: Path | str, **spec: Any) -> LoadedModel:
        return backend.load(LoadSpec(str(path), **spec), lambda _progress: None)

    return load_


@pytest.fixture(scope="session")
def tiny(load: Load, model_dir: Callable[..., Path]) -> LoadedModel:
    """A small Llama with random float32 weights and eight slots."""
    return load(model_dir(), parallel=8)


@pytest.fixture(scope="session")
def trained(load: Load) -> LoadedModel:
    """The demo model, with trained weights and so without near-ties."""
    if not (DEMO / "model.safetensors").is_file():
        pytest.skip("the demo model is not in this checkout")
    return load(DEMO, parallel=8)


@pytest.fixture
async def demo(socket_dir: Path) -> AsyncIterator[Server]:
    """A server with the demo model, whose rows are decoded together."""
    if not (DEMO / "model.safetensors").is_file():
        pytest.skip("the demo model is not in this checkout")
    backend: Any = MlxBackend()
    async with running(socket_dir, backend) as (app, channel, ready):
        server = Server(app, backend, channel, ready)
        await server.load(str(DEMO), context_length=256, parallel=4)
        yield server


@pytest.fixture(scope="module")
def make_bench(load: Load, model_dir: Callable[..., Path]) -> MakeBench:
    """Make benches for a shape, each with an empty prefix cache."""
    # Needs MLX, without which the tests of this folder are skipped.
    from support.prefix_bench import PLENTY, Bench

    models: dict[str, LoadedModel] = {}

    def make(shape: str, budget: int = PLENTY, **changes: Any) -> Bench:
        key = f"{shape} {changes}"
        if key not in models:
            models[key] = load(model_dir(shape, **changes), parallel=8, prefix_cache_bytes=0)
        return Bench(models[key], budget)

    return make


@pytest.fixture(autouse=True)
def mlx_is_left_idle() -> Iterator[None]:
    """Check after each test that MLX counts no active tasks, which would block later work."""
    yield
    assert_no_tasks_left()
