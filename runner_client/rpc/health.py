"""The one method of grpc.health.v1 that the client calls, without its package.

The base install has no grpcio-health-checking. ``HealthCheckRequest`` is a string
in field 1 and ``HealthCheckResponse`` an enum in field 1, which on the wire are
protobuf's own ``StringValue`` and ``Int32Value``.
See https://github.com/grpc/grpc/blob/master/doc/health-checking.md.
"""

from __future__ import annotations

from google.protobuf.wrappers_pb2 import Int32Value, StringValue

METHOD = "/grpc.health.v1.Health/Check"

_SERVING = 1


def request(service: str) -> StringValue:
    """Asks for a service by its full name; "" is the whole server."""
    return StringValue(value=service)


def is_serving(response: Int32Value) -> bool:
    """Whether the answer is SERVING."""
    return response.value == _SERVING
