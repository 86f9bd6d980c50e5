"""Answers that must call tools, as constraints."""

from __future__ import annotations

import re

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.contract import MAX_CONSTRAINT_BYTES
from runner_server.api.violations import ViolationCollector
from runner_server.chat.format import AnswerFormat, ChatFormat
from runner_server.engine.types import TOOL_CALLS, Constraint

MAX_SCHEMAS_BYTES = 4 * MAX_CONSTRAINT_BYTES
"""Most bytes of the schemas of all tools together."""

_FREE_NAMES = ("json_tools", "longcat")
"""Forms of calls whose names are JSON texts."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NO_PARAMETERS = '{"type": "object", "properties": {}}'


def check_required(check: ViolationCollector, request: pb.ChatRequest, model: ChatFormat) -> None:
    """Check what a request says about required calls.

    Args:
        check: Collects the violations.
        request: The request.
        model: The chat format of the model.
    """
    if request.tool_choice != pb.TOOL_CHOICE_REQUIRED:
        text = "only with TOOL_CHOICE_REQUIRED"
        check.require("tool_name", not request.tool_name, text)
        return
    form = model.answer.call_form
    if form and not model.answer.can_require_calls:
        text = f"this model's calls have the form {form}, which cannot be required"
        text += "; use TOOL_CHOICE_AUTO"
        check.require("tool_choice", ok=False, text=text)
    check.require("tools", bool(request.tools), "required with TOOL_CHOICE_REQUIRED")
    has_constraint = request.HasField("constraint")
    text = "cannot be combined with TOOL_CHOICE_REQUIRED, which is one of its own"
    check.require("constraint", not has_constraint, text)
    names = [tool.name for tool in request.tools]
    known = not request.tool_name or request.tool_name in names
    check.require("tool_name", known, "not the name of one of the tools")
    _check_tools(check, request, form)


def _check_tools(check: ViolationCollector, request: pb.ChatRequest, form: str) -> None:
    total = sum(len(tool.parameters.encode()) for tool in request.tools)
    text = f"their parameters have {total} bytes; at most {MAX_SCHEMAS_BYTES}"
    check.require("tools", total <= MAX_SCHEMAS_BYTES, text)
    for index, tool in enumerate(request.tools):
        size = len(tool.parameters.encode())
        text = f"{size} bytes; at most {MAX_CONSTRAINT_BYTES} with TOOL_CHOICE_REQUIRED"
        check.require(f"tools[{index}].parameters", size <= MAX_CONSTRAINT_BYTES, text)
        # Other names could not be told from the rest of a call.
        fits = form in _FREE_NAMES or not tool.name or bool(_NAME.fullmatch(tool.name))
        text = "1 to 64 letters, digits, _ and -: this model's calls have no others"
        check.require(f"tools[{index}].name", fits, text)


def required_calls(request: pb.ChatRequest, answer: AnswerFormat) -> Constraint:
    """Return the constraint of an answer that must call tools.

    Args:
        request: A valid request.
        answer: The format of the model's answers.
    """
    texts = [answer.call_form, *answer.call_markers]
    for index, tool in enumerate(request.tools):
        if not request.tool_name or tool.name == request.tool_name:
            parameters = tool.parameters.strip()
            schema = _NO_PARAMETERS if parameters in ("", "{}") else parameters
            texts += [f"tools[{index}].parameters", tool.name, schema]
    return Constraint(TOOL_CALLS, tuple(texts))
