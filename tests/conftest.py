"""Fixtures: servers in process, and small models on disk."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from runner_common.contract import TOKEN_VARIABLE, USE_TOKEN_VARIABLE
from runner_common.memory.headroom import MINIMUM_VARIABLE, OVERHEAD_VARIABLE
from runner_common.memory.reservations import DIRECTORY_VARIABLE
from support.fakes import FakeBackend
from support.harness import Server, StartServer, running
from support.user_home import replace_home, share_kernels
from support.worker_blas import keep_from_children, preload_in_workers

# The duration of a single example means nothing on a busy machine.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

_runtime_directory = tempfile.TemporaryDirectory(prefix="mlx-runner-tests-")
"""Reservations of this session and its children, apart from those of parallel sessions."""

_home = tempfile.TemporaryDirectory(prefix="mlx-runner-home-", ignore_cleanup_errors=True)
"""Home of this session and its children, with the caches that its tests share."""


def pytest_configure(config: pytest.Config) -> None:
    """Restore SIGINT and clear variables which children would inherit.

    A suite started in the background ignores SIGINT. Its children would inherit that, and tests
    of Ctrl-C would wait in vain. An inherited token would make servers require it, and inherited
    headroom variables would change how much memory is kept free.
    """
    for variable in (TOKEN_VARIABLE, USE_TOKEN_VARIABLE, OVERHEAD_VARIABLE, MINIMUM_VARIABLE):
        os.environ.pop(variable, None)
    os.environ[DIRECTORY_VARIABLE] = _runtime_directory.name
    keep_from_children()
    replace_home(Path(_home.name))
    if cache := getattr(config, "cache", None):
        share_kernels(Path(_home.name), cache.mkdir("kernels"))
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Prepare the environment of workers."""
    preload_in_workers()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage while tests are found, which makes many objects and drops few."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Leave objects that exist before the first test out of garbage collections."""
    _leave_out_of_collections()


def pytest_runtest_logfinish() -> None:
    """Leave imports of a test out, too: mlx_lm and transformers are 80,000 objects."""
    if len(sys.modules) > _modules_left_out + _MANY_MODULES:
        _leave_out_of_collections()


_MANY_MODULES = 50
_modules_left_out = 0


def _leave_out_of_collections() -> None:
    """Collect garbage, and leave all other objects out of later collections.

    The tests and all that they import are 270,000 objects in a run of everything. A collection of
    these takes 0.1 s, and every load of a model and every test of the pool does one.
    """
    global _modules_left_out  # noqa: PLW0603 - what pytest's hooks know of each other
    gc.collect()
    gc.freeze()
    _modules_left_out = len(sys.modules)


def pytest_unconfigure() -> None:
    """Remove the reservations and the home of this session."""
    os.environ.pop(DIRECTORY_VARIABLE, None)
    _runtime_directory.cleanup()
    _home.cleanup()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape lone surrogates in captured text, which a worker could not send."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


def _socket_dir() -> Iterator[Path]:
    """A fresh directory, with a path short enough for a Unix socket."""
    path = Path(tempfile.mkdtemp(prefix="mr-"))
    yield path
    shutil.rmtree(path)


socket_dir = pytest.fixture(_socket_dir, name="socket_dir")
module_socket_dir = pytest.fixture(_socket_dir, scope="module", name="module_socket_dir")


@pytest.fixture
async def start_server(socket_dir: Path) -> AsyncIterator[StartServer]:
    """Start servers on a fake model library."""
    async with AsyncExitStack() as stack:

        async def start(backend: FakeBackend | None = None, **config: Any) -> Server:
            backend = backend or FakeBackend()
            parts = await stack.enter_async_context(running(socket_dir, backend, **config))
            stack.callback(backend.open_gates)
            app, channel, ready = parts
            return Server(app, backend, channel, ready)

        yield start


@pytest.fixture
async def server(start_server: StartServer) -> Server:
    """A server without a model."""
    return await start_server()


@pytest.fixture
async def loaded(server: Server) -> Server:
    """A server with the fake model loaded and four slots."""
    await server.load()
    return server


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Build small models, each once; takes the arguments of ``models.build_model``."""
    pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
    from support.models import build_model

    built: dict[str, Path] = {}

    def get(shape: str = "llama", **kwargs: Any) -> Path:
        key = repr((shape, sorted(kwargs.items())))
        if key not in built:
            path = tmp_path_factory.mktemp("models") / f"{shape}-{len(built)}"
            built[key] = build_model(path, shape, **kwargs)
        return built[key]

    return get
