"""gRPC channel of the load generator, shared by the gRPC contenders."""

from __future__ import annotations

import grpc

_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.max_send_message_length", -1),
    # A pooled subchannel to a reused port would keep the back-off of the previous process.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
)


def open_channel(port: int) -> grpc.aio.Channel:
    """Open a channel to a server on this machine."""
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", _OPTIONS)


def in_words(error: grpc.aio.AioRpcError) -> str:
    """Format the status of a failed call on one line."""
    return f"{error.code().name}: {(error.details() or '')[:200]}"
