"""Fixtures of pool tests. No test may leave a process, a reservation or a failed task."""

from __future__ import annotations

import errno
import gc
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from runner_common.memory.records import Record
from runner_common.memory.reservations import ReservationBook
from support.fake_child import wait_until
from support.pool_machine import Machine, use_machine


@pytest.fixture(autouse=True)
def leaves_nothing(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Check that a test leaves no child, no reservation, and no complaint of asyncio."""
    before = set(psutil.Process().children())
    yield
    gc.collect()
    complaints = [
        record.getMessage()
        for record in caplog.get_records("call")
        if record.name == "asyncio"
        and record.levelno >= logging.WARNING
        and not _is_of_the_poller(record)
    ]
    assert complaints == []
    # The thread of a cancelled start may need a moment to give up.
    wait_until(lambda: set(psutil.Process().children()) <= before and not _reservations())


def _is_of_the_poller(record: logging.LogRecord) -> bool:
    """Return whether gRPC reads its wakeup socket late, when it has already closed it.

    That happens now and then as the last channel of a process closes, and harms nothing
    (https://github.com/grpc/grpc/issues/25364 is of the same kind).
    """
    error = record.exc_info[1] if record.exc_info else None
    if not isinstance(error, OSError) or error.errno != errno.EBADF:
        return False
    return traceback.extract_tb(error.__traceback__)[-1].name.endswith("_handle_events")


def _reservations() -> tuple[Record, ...]:
    with ReservationBook().locked() as view:
        return view.records()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """A machine whose runners exist in memory only."""
    return use_machine(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two small models with a long context; the first has a chat template and embeds texts."""
    from support.embedding_models import say_that_it_embeds
    from support.models import build_model
    from support.pool_server import CONTEXT

    folder = tmp_path_factory.mktemp("models")
    one, two = (
        build_model(folder / name, seed=seed, max_position_embeddings=CONTEXT)
        for name, seed in (("one", 1), ("two", 2))
    )
    (one / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}.{% endfor %}")
    return say_that_it_embeds(one), two


@pytest.fixture(scope="module")
def one(models: tuple[Path, Path]) -> Path:
    """The first of the two models."""
    return models[0]
