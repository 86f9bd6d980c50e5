"""Constraints of requests: validation, and compilation on other threads."""

from __future__ import annotations

import asyncio

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.contract import CONSTRAINT_KINDS, MAX_CHOICES, MAX_CONSTRAINT_BYTES
from runner_server.api.violations import ViolationCollector
from runner_server.chat.reasoning import Reasoning
from runner_server.engine.backend import Matcher, ModelHandle
from runner_server.engine.types import Constraint

CONSTRAINT_KIND_VALUES = [
    pb.ConstraintKind.Value(f"CONSTRAINT_KIND_{kind.upper()}") for kind in CONSTRAINT_KINDS
]
"""All kinds of constraints, for ``Capabilities``."""


def parse_constraint(check: ViolationCollector, message: pb.Constraint) -> Constraint | None:
    """Return a constraint; record a missing kind and sizes out of range as violations.

    Returns:
        None if the constraint has no kind.
    """
    match message.WhichOneof("kind"):
        case None:
            check.require("constraint", ok=False, text=f"required: {' or '.join(CONSTRAINT_KINDS)}")
            return None
        case "json_object":
            return Constraint("json_object")
        case "choice":
            return _choice(check, message.choice)
        case kind:
            text: str = getattr(message, kind)
            _check_size(check, f"constraint.{kind}", text)
            return Constraint(kind, (text,))


def _choice(check: ViolationCollector, choice: pb.Choice) -> Constraint | None:
    field = "constraint.choice.texts"
    count = len(choice.texts)
    if not 1 <= count <= MAX_CHOICES:
        check.require(field, ok=False, text=f"{count} texts; 1 to {MAX_CHOICES}")
        return None
    for index, text in enumerate(choice.texts):
        check.require(f"{field}[{index}]", bool(text), "empty")
    _check_size(check, field, "".join(choice.texts))
    return Constraint("choice", tuple(choice.texts))


def _check_size(check: ViolationCollector, field: str, text: str) -> None:
    size = len(text.encode())
    inside = 1 <= size <= MAX_CONSTRAINT_BYTES
    check.require(field, inside, f"{size} bytes; 1 to {MAX_CONSTRAINT_BYTES}")


async def start_matcher(
    constraint: Constraint | None, reasoning: Reasoning | None, model: ModelHandle
) -> Matcher | None:
    """Compile a constraint if it is not cached, and return a matcher; None if nothing is limited.

    Args:
        constraint: What the text must be; None for any text.
        reasoning: The reasoning before that text, and its limit; None if the text begins at once.
        model: The model.

    Raises:
        InvalidField: The constraint or the limit cannot be used with the model.
    """
    grammar = None
    if constraint is not None:
        future = asyncio.wrap_future(model.grammars.compile(constraint))
        # Shielded, because other calls may wait for the same grammar.
        grammar = await asyncio.shield(future)
    if reasoning is not None:
        grammar = await asyncio.wrap_future(model.grammars.after_reasoning(reasoning, grammar))
    return grammar.start() if grammar else None
