"""Channels to a runner, with every gRPC option of the client in one place."""

from __future__ import annotations

import json

import grpc

from runner_common.contract import MAX_REQUEST_BYTES, SERVICE_NAME

_RETRIED_METHODS = ("Status", "Estimate", "Tokenize", "Detokenize", "RenderChat")
"""Never Completion: gRPC would replay a call that has not received its headers yet, and the
model would do the work twice. Never calls that change the runner, such as Load and
Drain."""

_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": SERVICE_NAME, "method": name} for name in _RETRIED_METHODS],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}

_OPTIONS: tuple[tuple[str, int | str], ...] = (
    # http_proxy would capture calls to the loopback address.
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", -1),
    # By default, a failed first connection backs off for up to 20 s.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Channels share connections and their backoff through a global pool, but a new child may
    # listen on the port of a dead one.
    ("grpc.use_local_subchannel_pool", 1),
    # Otherwise, a DNS TXT record could replace the service config.
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
)
# Keepalive stays off, as is gRPC's default: by default a server ends a silent stream whose
# client sends pings ("Too many pings").


def open_channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    """Create a channel; the first call opens the connection."""
    if credentials is not None:
        return grpc.secure_channel(address, credentials, _secure_options(address))
    return grpc.insecure_channel(address, _OPTIONS)


def open_aio_channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """Create an asyncio channel, bound to the running event loop."""
    if credentials is not None:
        return grpc.aio.secure_channel(address, credentials, _secure_options(address))
    return grpc.aio.insecure_channel(address, _OPTIONS)


def _secure_options(address: str) -> tuple[tuple[str, int | str], ...]:
    if not address.startswith("unix:"):
        return _OPTIONS
    # Certificates do not contain socket paths.
    return (*_OPTIONS, ("grpc.ssl_target_name_override", "localhost"))
