"""Ranks sharing one model, and a single process to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.rank_processes import Ranks, ranks
from support.server_child import Child, running


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """A server for whole models."""
    pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
    with running(tmp_path_factory.mktemp("alone"), OMP_NUM_THREADS="1") as child:
        yield child


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two ranks without a model."""
    pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
    with ranks(tmp_path_factory.mktemp("two"), 2) as started:
        yield started


@pytest.fixture(scope="session")
def deep(model_dir: Callable[..., Path]) -> Path:
    """A model of 60 small layers, whose load and prompts take a while."""
    return model_dir("llama", num_hidden_layers=60)
