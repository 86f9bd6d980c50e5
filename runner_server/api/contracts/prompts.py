"""Prompts of the contracts whose messages have the same field for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runner_server.api.prompts import Prompt

if TYPE_CHECKING:
    from runner_server.api.violations import ViolationCollector

# The stubs are untyped, because their package has no py.typed.
Message = Any


def read_prompt(check: ViolationCollector, request: Message) -> Prompt:
    """Return the prompt; record a missing or empty prompt as a violation."""
    match request.WhichOneof("input"):
        case "tokenized":
            ids = request.tokenized.input_ids
            check.require("tokenized.input_ids", bool(ids), "the prompt is empty")
            return Prompt("tokenized.input_ids", ids)
        case "text":
            check.require("text", bool(request.text), "the prompt is empty")
            return Prompt("text", request.text)
        case _:
            check.require("input", ok=False, text="required: tokenized or text")
            return Prompt("input", "")
