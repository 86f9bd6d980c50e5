"""Transfer of work items between ranks, as lists of JSON values."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

from runner_server.engine.work import DecodeItem, PrefillItem, PromptChunk, WorkItem


def item_values(item: WorkItem) -> list[Any]:
    """Return the values to send for a work item."""
    if isinstance(item, PrefillItem):
        return ["prefill", [astuple(chunk) for chunk in item.chunks]]
    return ["decode", list(item.joining), item.expected]


def item_of(values: list[Any]) -> WorkItem:
    """Rebuild a work item from the values sent by rank 0.

    Raises:
        ValueError: The values are not those of a work item.
    """
    match values:
        case ["prefill", chunks]:
            return PrefillItem(tuple(PromptChunk(*chunk) for chunk in chunks))
        case ["decode", joining, expected]:
            return DecodeItem(tuple(joining), expected)
        case _:
            raise ValueError(f"not a work item of rank 0: {values!r}")
