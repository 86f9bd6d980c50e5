"""The services whose calls are told of, and whose failures are answered from the error table.

Health and reflection are not among them: they answer with codes of their own.
"""

from __future__ import annotations

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.handshake import SERVICE_NAME

SMG_SERVICE_NAME = "mlx.grpc.engine.MlxEngine"
"""What a server with ``--smg`` speaks too; its stubs are another package, and perhaps missing."""

_SMG_METHODS = (
    "Abort",
    "Generate",
    "GetModelInfo",
    "GetServerInfo",
    "GetTokenizer",
    "HealthCheck",
)

METHODS = {
    f"/{SERVICE_NAME}/{name}": name
    for name in pb.DESCRIPTOR.services_by_name["RunnerService"].methods_by_name
} | {f"/{SMG_SERVICE_NAME}/{name}": name for name in _SMG_METHODS}
"""Their methods' paths on the wire, and the names they are told of by: no two are alike."""

FULL_NAMES = {name: path.removeprefix("/") for path, name in METHODS.items()}
"""The names with their services, as OpenTelemetry has them."""

GENERATING = frozenset({"Completion", "Generate"})
"""Those which make text, one in each service."""
