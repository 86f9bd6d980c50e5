"""The health service of a fake runner."""

from __future__ import annotations

import grpc
from google.protobuf.wrappers_pb2 import Int32Value, StringValue


def health_handler() -> grpc.GenericRpcHandler:
    """Return a health service with the constant answer SERVING; see ``rpc.transport.health``."""
    check = grpc.unary_unary_rpc_method_handler(
        lambda request, context: Int32Value(value=1),  # noqa: ARG005 - gRPC's signature
        request_deserializer=StringValue.FromString,
        response_serializer=Int32Value.SerializeToString,
    )
    return grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})
