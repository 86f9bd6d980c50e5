"""The health check of grpc.health.v1, without the grpcio-health-checking package.

The base installation does not include that package. ``HealthCheckRequest`` is a string in
field 1 and ``HealthCheckResponse`` an enum in field 1. On the wire these equal protobuf's
own ``StringValue`` and ``Int32Value``.
See https://github.com/grpc/grpc/blob/master/doc/health-checking.md.
"""

from __future__ import annotations

from google.protobuf.wrappers_pb2 import Int32Value, StringValue

METHOD = "/grpc.health.v1.Health/Check"

_SERVING = 1


def request(service: str) -> StringValue:
    """Return the request for a service by full name; "" is the whole server."""
    return StringValue(value=service)


def is_serving(response: Int32Value) -> bool:
    """Return whether the response is SERVING."""
    return response.value == _SERVING
