"""``python -m runner_server.mlx_backend.estimating JSON``: prints a load's memory need.

Builds the model with unread weights, makes the same decisions as a load, prints one line of JSON
and exits; see :mod:`runner_common.memory.need_query`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.memory.need_query import NeedAnswer, NeedRequest
from runner_common.signals import reset_inherited_signals
from runner_server.engine.adapters import AdapterSpec
from runner_server.engine.types import Dtype, LoadSpec
from runner_server.errors import InvalidField, ModelUnsupported, RunnerFault
from runner_server.mlx_backend.backend import use_offline


def answer(request: NeedRequest) -> NeedAnswer:
    """Return the memory need of a load, computed by the server's own plan.

    Raises:
        RunnerFault: As for a load.
    """
    use_offline()
    from runner_server.mlx_backend.fusing import kernels_of_this_run  # noqa: PLC0415 - imports MLX
    from runner_server.mlx_backend.loading.loader import plan_load  # noqa: PLC0415 - imports MLX

    spec = LoadSpec(
        model=request.path,
        context_length=request.context_length,
        parallel=request.parallel,
        dtype=Dtype(request.dtype),
        memory_limit_bytes=request.memory_limit_bytes,
        prefix_cache_bytes=request.prefix_cache_bytes,
        allow_inexact=request.allow_inexact,
        kv_bits=request.kv_bits,
        adapters=tuple(AdapterSpec(name, path) for name, path in request.adapters),
        draft_model=request.draft_path,
    )
    # Some models evaluate arrays while they are built.
    with kernels_of_this_run(checks=False):
        plan = plan_load(Path(request.path), spec)
    return NeedAnswer(
        need=plan.need,
        dtype=plan.dtype.value,
        context_length=plan.context_length,
        model_context_length=plan.max_context_length,
        parallel=plan.parallel,
        notes=plan.warnings,
    )


def _values(request: NeedRequest) -> dict[str, Any]:
    try:
        found = answer(request)
    except RunnerFault as fault:
        violations = fault.violations if isinstance(fault, InvalidField) else []
        if isinstance(fault, ModelUnsupported):
            # Most code that raises this error has no access to the directory; a load adds it too.
            fault.metadata.setdefault("model", request.path)
        return {
            "reason": pb.ErrorReason.Name(fault.reason).removeprefix("ERROR_REASON_"),
            "message": str(fault),
            "metadata": fault.metadata,
            "violations": list(violations),
        }
    return {
        "need": found.need.as_dict(),
        "dtype": found.dtype,
        "context_length": found.context_length,
        "model_context_length": found.model_context_length,
        "parallel": found.parallel,
        "notes": found.notes,
    }


def main() -> int:
    """Answer the request on the command line; return the exit code."""
    reset_inherited_signals()
    request = NeedRequest(**json.loads(sys.argv[1]))
    print(json.dumps(_values(request)), flush=True)  # noqa: T201 - the answer
    return 0


if __name__ == "__main__":
    sys.exit(main())
