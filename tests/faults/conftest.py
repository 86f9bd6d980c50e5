"""Models for the fault tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.fake_child import write_model


@pytest.fixture
def stub(tmp_path: Path) -> str:
    """Write model files for the gate, to be served with a fake model library."""
    return str(write_model(tmp_path / "tiny"))


@pytest.fixture(scope="session")
def model(model_dir: Callable[..., Path]) -> str:
    """Build a real model with room for a completion of a minute."""
    return str(model_dir(max_position_embeddings=32_000))
