"""A fast BLAS in the processes of pytest-xdist, which load models as runners do."""

from __future__ import annotations

import os
import sys

from runner_client.host.blas import PRELOAD, find_blas, in_front

_ADDED = "MLX_RUNNER_TESTS_ADDED"
"""Variable with the names of the others that were set for a worker."""


def preload_in_workers() -> None:
    """Let processes that start from here have the BLAS that a runner has.

    With the BLAS of MLX, the schema corpus takes 29 s of CPU instead of 11.
    """
    if sys.platform != "linux" or PRELOAD in os.environ or not (blas := find_blas()):
        return
    added = dict(in_front(os.environ, blas).items() - os.environ.items())
    os.environ |= {**added, _ADDED: " ".join(added)}


def keep_from_children() -> None:
    """Remove the variables of this worker: children of tests choose a BLAS themselves."""
    for name in os.environ.pop(_ADDED, "").split():
        del os.environ[name]
