"""Shutdown rpc for servers started by hashicorp/go-plugin.

go-plugin's ``Kill`` calls ``plugin.GRPCController/Shutdown``, waits two seconds and then kills:
https://github.com/hashicorp/go-plugin/blob/main/internal/plugin/grpc_controller.proto.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import grpc

_SPAWNED = "PLUGIN_PROTOCOL_VERSIONS"
"""Variable that only go-plugin sets, for the processes it starts."""


def add_controller(server: grpc.aio.Server, on_shutdown: Callable[[], object]) -> None:
    """Add the shutdown rpc if go-plugin started this process.

    Without go-plugin the rpc does not exist, because no caller may end a server shared by many.

    Args:
        server: A server that has not started yet.
        on_shutdown: Called when the host requests a shutdown; should begin an orderly stop.
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
