"""Imports without garbage collections."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from runner_common.interpreter import importing


def test_collections_go_on_after_failed_imports() -> None:
    with importing():
        assert not gc.isenabled()
    with pytest.raises(ModuleNotFoundError), importing():
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()


def test_a_server_leaves_its_imports_out_of_collections() -> None:
    code = (
        "import gc, runner_server.__main__ as server, runner_server.launch as launch;"
        "launch.run_server = lambda: print(gc.isenabled(), gc.get_freeze_count() > 10_000);"
        "server.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"
