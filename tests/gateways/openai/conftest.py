"""A server and a pool with an HTTP port, both with the demo model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.http_child import HttpChild, embedding_demo, http_pool, http_server


@pytest.fixture(scope="module", params=["server", "pool"])
def child(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HttpChild]:
    """A server or a pool."""
    folder = tmp_path_factory.mktemp(request.param)
    run = http_server if request.param == "server" else http_pool
    with run(folder, embedding_demo(folder / "model")) as running:
        yield running
