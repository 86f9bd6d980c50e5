"""What hashicorp/go-plugin asks of its children beside their own service: to end.

Its ``Kill`` calls ``plugin.GRPCController/Shutdown``, waits two seconds and then kills:
https://github.com/hashicorp/go-plugin/blob/main/internal/plugin/grpc_controller.proto.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import grpc

_SPAWNED = "PLUGIN_PROTOCOL_VERSIONS"
"""A variable that go-plugin gives to its children, and nobody else has."""


def add_controller(server: grpc.aio.Server, on_shutdown: Callable[[], object]) -> None:
    """Lets go-plugin end this process, if go-plugin started it.

    Nobody else is to end a server by a call: other callers may share it.

    Args:
        server: Not started yet.
        on_shutdown: Called when the host asks; should begin an orderly stop.
    """
    if _SPAWNED not in os.environ:
        return

    async def shutdown(_empty: bytes, _context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        on_shutdown()
        return b""

    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Shutdown": grpc.unary_unary_rpc_method_handler(shutdown)
    }
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("plugin.GRPCController", handlers),)
    )
