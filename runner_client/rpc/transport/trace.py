"""Propagation of the caller's OpenTelemetry context with every call."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner_client.rpc.transport.access import Metadata


def with_trace(metadata: Metadata | None) -> Metadata | None:
    """Return ``metadata`` plus the headers of the current trace context."""
    # Only a program that has imported opentelemetry has a context; others skip the slow import.
    if "opentelemetry.context" not in sys.modules:
        return metadata
    from opentelemetry import propagate  # noqa: PLC0415 - optional dependency

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    # gRPC requires lower case.
    found = tuple((name.lower(), value) for name, value in carrier.items())
    return (*(metadata or ()), *found) or None
