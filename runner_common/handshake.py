"""The ready line a runner prints, and the names both sides use.

The line is go-plugin's five-field form, so that a Go host can use
hashicorp/go-plugin unchanged:
``CORE-VERSION|APP-VERSION|NETWORK|ADDRESS|PROTOCOL``, for instance
``1|1|tcp|127.0.0.1:50051|grpc`` or ``1|1|unix|/run/runner.sock|grpc``.
See https://github.com/hashicorp/go-plugin/blob/main/docs/internals.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ERROR_DOMAIN = "mlxrunner.v1"
"""The ``domain`` of every ``google.rpc.ErrorInfo``."""

SERVICE_NAME = "mlxrunner.v1.RunnerService"
"""The full name of the service, as health and reflection know it."""

HEALTH_SERVICES = ("", SERVICE_NAME, "plugin")
"""Every name health is answered for; go-plugin asks for ``plugin``."""

TOKEN_VARIABLE = "MLX_RUNNER_TOKEN"  # noqa: S105 - its name
"""The environment variable that tells a server which token its callers must send."""

_CORE_VERSION = "1"
_APP_VERSION = "1"
_PROTOCOL = "grpc"


@dataclass(frozen=True)
class ReadyLine:
    """Where a runner listens.

    Attributes:
        network: ``"tcp"`` or ``"unix"``.
        address: ``HOST:PORT``, or the path of the socket.
    """

    network: Literal["tcp", "unix"]
    address: str

    @property
    def target(self) -> str:
        """The address as a gRPC channel takes it (``unix:/path`` for a socket)."""
        return self.address if self.network == "tcp" else f"unix:{self.address}"

    @property
    def port(self) -> int | None:
        """The TCP port; None for a unix socket."""
        return int(self.address.rpartition(":")[2]) if self.network == "tcp" else None

    def format(self) -> str:
        """The line, without its newline."""
        fields = (_CORE_VERSION, _APP_VERSION, self.network, self.address, _PROTOCOL)
        return "|".join(fields)

    @classmethod
    def parse(cls, line: str) -> ReadyLine:
        """Reads a ready line.

        Raises:
            ValueError: The line is no ready line of a version this package speaks;
                the message quotes it.
        """
        fields = line.strip().split("|")
        known = len(fields) == 5 and fields[:2] == [_CORE_VERSION, _APP_VERSION]
        if known and fields[4] == _PROTOCOL:
            match fields[2]:
                case "tcp" if fields[3].rpartition(":")[2].isdecimal():
                    return cls("tcp", fields[3])
                case "unix" if fields[3]:
                    return cls("unix", fields[3])
        raise ValueError(f"not a ready line (expected 1|1|tcp or unix|ADDRESS|grpc): {line!r}")
