"""The ready line, which a runner prints once it answers calls.

It has go-plugin's five fields, so that a Go host can use hashicorp/go-plugin unchanged:
``CORE-VERSION|APP-VERSION|NETWORK|ADDRESS|PROTOCOL``, for instance
``1|1|tcp|127.0.0.1:50051|grpc`` or ``1|1|unix|/run/runner.sock|grpc``.
See https://github.com/hashicorp/go-plugin/blob/main/docs/internals.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_CORE_VERSION = "1"
_APP_VERSION = "1"
_PROTOCOL = "grpc"


@dataclass(frozen=True)
class ReadyLine:
    """Address of a runner.

    Attributes:
        network: ``"tcp"`` or ``"unix"``.
        address: ``HOST:PORT``, or the path of the socket.
    """

    network: Literal["tcp", "unix"]
    address: str

    @property
    def target(self) -> str:
        """The address as a gRPC target (``unix:/path`` for a socket)."""
        return self.address if self.network == "tcp" else f"unix:{self.address}"

    @property
    def port(self) -> int | None:
        """The TCP port; None for a unix socket."""
        return int(self.address.rpartition(":")[2]) if self.network == "tcp" else None

    def format(self) -> str:
        """Return the line, without a newline."""
        fields = (_CORE_VERSION, _APP_VERSION, self.network, self.address, _PROTOCOL)
        return "|".join(fields)

    @classmethod
    def parse(cls, line: str) -> ReadyLine:
        """Parse a ready line.

        Raises:
            ValueError: The line is not a ready line of a supported version. The message
                quotes the line.
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
