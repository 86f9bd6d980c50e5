"""Real models in this process; without mlx these tests are skipped, and say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner_server.engine.backend import LoadedModel
from runner_server.engine.types import LoadSpec
from runner_server.mlx_backend import MlxBackend
from support.mlx_tasks import assert_no_tasks_left

Load = Callable[..., LoadedModel]
DEMO = Path(__file__).parents[2] / "runner_server/demo/model"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test of this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.mlx)


@pytest.fixture(scope="session")
def backend() -> Iterator[MlxBackend]:
    """MLX, opened on the thread of the tests."""
    backend = MlxBackend()
    backend.open()
    yield backend
    backend.close()


@pytest.fixture(scope="session")
def load(backend: MlxBackend) -> Load:
    """Loads a model from a directory; other arguments as ``LoadSpec``."""

    def load_(path: Path | str, **spec: Any) -> LoadedModel:
        return backend.load(LoadSpec(str(path), **spec), lambda _progress: None)

    return load_


@pytest.fixture(scope="session")
def tiny(load: Load, model_dir: Callable[..., Path]) -> LoadedModel:
    """A small Llama with random weights in float32, eight places."""
    return load(model_dir(), parallel=8)


@pytest.fixture(scope="session")
def trained(load: Load) -> LoadedModel:
    """The demo model, whose weights are trained: its likeliest tokens are clear."""
    if not (DEMO / "model.safetensors").is_file():
        pytest.skip("the demo model is not in this checkout")
    return load(DEMO, parallel=8)


@pytest.fixture(autouse=True)
def mlx_is_left_idle() -> Iterator[None]:
    """After each test, failing loads among them, MLX counts no task that it would wait for."""
    yield
    assert_no_tasks_left()
