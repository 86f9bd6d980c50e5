"""The caller's OpenTelemetry context, sent on with every call."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner_client.rpc.access import Metadata


def with_trace(metadata: Metadata | None) -> Metadata | None:
    """Adds the headers of the current context, as the program's propagators write them."""
    # A program that has not imported it has no context, and need not wait for the import.
    if "opentelemetry.context" not in sys.modules:
        return metadata
    from opentelemetry import propagate  # noqa: PLC0415 - need not be installed

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    # gRPC takes lower case only.
    found = tuple((name.lower(), value) for name, value in carrier.items())
    return (*(metadata or ()), *found) or None
