"""A stand-in of the hub with the demo model, and an empty cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from runner_client.pull import download
from support.hub import StandInHub, stand_in_hub

pytest.importorskip("huggingface_hub")

DEMO = Path(__file__).parents[3] / "runner_server" / "demo" / "model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """Run a hub with the demo model on its main branch, and the one that huggingface_hub uses."""
    from huggingface_hub import constants

    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)
    # The variable may be set: servers set it for themselves.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with stand_in_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        running.commit({path.name: path.read_bytes() for path in DEMO.iterdir()})
        yield running
