"""Reasoning as requests ask for it."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.http.ollama.model_files import describe_files
from runner_common.serving.interceptor import UnreadableRequestError

if TYPE_CHECKING:
    from runner_common.http.ollama.translation.requests import Generation

_SWITCH = "enable_thinking"
"""Argument of most templates, and of the ones that mlx_lm has in Python."""

_SHORT_SWITCH = re.compile(r"""(?<![\w.'"<>/])thinking(?![\w>'"])""")
"""The same argument of others, such as DeepSeek V3.1's."""

_EFFORT = "reasoning_effort"


async def decide_reasoning(wanted: Generation, model: pb.Model) -> None:
    """Make the model reason or not, by arguments of the template and by a budget.

    Raises:
        UnreadableRequestError: The model cannot reason, and the request wants that.
    """
    if wanted.think and not model.capabilities.reasoning:
        text = f"{wanted.model!r} does not support thinking; leave it out"
        raise UnreadableRequestError([("think", text)])
    request = wanted.request
    if wanted.think is None or not isinstance(request, pb.ChatRequest):
        return
    files = await asyncio.to_thread(describe_files, model.path)
    arguments = _arguments(wanted.think, wanted.effort, files.template if files else "")
    request.chat_template_kwargs = json.dumps(arguments)
    if not wanted.think and model.capabilities.reasoning:
        # Whatever the template makes of its arguments.
        request.reasoning_budget = 0


def _arguments(think: bool, effort: str, template: str) -> dict[str, bool | str]:
    """Return the arguments that a template has. Templates in Python refuse any others."""
    arguments: dict[str, bool | str] = {_SWITCH: think}
    if _SHORT_SWITCH.search(template):
        arguments["thinking"] = think
    if effort and _EFFORT in template:
        arguments[_EFFORT] = effort
    return arguments
