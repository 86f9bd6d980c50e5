"""Models that the faults happen to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.fake_child import write_model


@pytest.fixture
def stub(tmp_path: Path) -> str:
    """Files that pass the gate, for a server with a fake model library."""
    return str(write_model(tmp_path / "tiny"))


@pytest.fixture(scope="session")
def model(model_dir: Callable[..., Path]) -> str:
    """A real model with room for a completion that takes a minute."""
    return str(model_dir(max_position_embeddings=32_000))
