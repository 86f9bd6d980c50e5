"""The fields that requests for completions and for answers to conversations share."""

from __future__ import annotations

from typing import Any

from mlxrunner.v1 import runner_pb2 as pb

SHARED_FIELDS = frozenset(pb.CompletionRequest.DESCRIPTOR.fields_by_name).intersection(
    pb.ChatRequest.DESCRIPTOR.fields_by_name
)
"""Names of the fields with one meaning in both requests."""


def shared_fields(request: pb.CompletionRequest | pb.ChatRequest) -> dict[str, Any]:
    """Return the shared fields that are set, as arguments for a request of the other kind."""
    return {
        field.name: value for field, value in request.ListFields() if field.name in SHARED_FIELDS
    }
