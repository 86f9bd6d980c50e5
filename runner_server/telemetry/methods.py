"""RPC methods covered by telemetry and error translation.

Health and reflection are excluded, because they set their status codes themselves.
"""

from __future__ import annotations

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.contract import SERVICE_NAME

SMG_SERVICE_NAME = "mlx.grpc.engine.MlxEngine"
"""Service added by ``--smg``; its stubs are in another package, which may be missing."""

_SMG_METHODS = (
    "Abort",
    "Generate",
    "GetModelInfo",
    "GetServerInfo",
    "GetTokenizer",
    "HealthCheck",
)

_RUNNER_METHODS = tuple(pb.DESCRIPTOR.services_by_name["RunnerService"].methods_by_name)


VLLM_SERVICE_NAME = "vllm.grpc.engine.VllmEngine"
"""Service added by ``--vllm``; its stubs are in the same package."""

_VLLM_METHODS = (
    *_SMG_METHODS,
    "Embed",
    "FlushCache",
    "GetLoads",
    "StartProfile",
    "StopProfile",
    "SubscribeKvEvents",
)


def _smg_name(name: str) -> str:
    """Return a name with the service in front if the runner's own service has it, too."""
    return f"MlxEngine.{name}" if name in _RUNNER_METHODS else name


METHODS = (
    {f"/{SERVICE_NAME}/{name}": name for name in _RUNNER_METHODS}
    | {f"/{SMG_SERVICE_NAME}/{name}": _smg_name(name) for name in _SMG_METHODS}
    | {f"/{VLLM_SERVICE_NAME}/{name}": f"VllmEngine.{name}" for name in _VLLM_METHODS}
)
"""Names of the methods by their paths on the wire. Names are unique across the services."""

FULL_NAMES = {name: path.removeprefix("/") for path, name in METHODS.items()}
"""Names with their services by method name, as OpenTelemetry expects them."""

GENERATING = frozenset({"Chat", "Completion", "Generate", "VllmEngine.Generate"})
"""Methods that generate text."""
