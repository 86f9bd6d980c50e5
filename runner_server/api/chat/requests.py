"""Requests for answers: a conversation, completed like the prompt that it is rendered to."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.api.chat.conversation import read_conversation
from runner_server.api.chat.prompting import chat_prompt
from runner_server.api.chat.required import check_required, required_calls
from runner_server.api.generation import GenerationDraft
from runner_server.api.prompts import Prompt
from runner_server.api.validation import MAX_INT32, check_ends, generation_draft
from runner_server.api.violations import ViolationCollector
from runner_server.chat.answer import Answer
from runner_server.chat.format import REASONING, AnswerFormat, ChatFormat
from runner_server.chat.reasoning import Reasoning
from runner_server.chat.renderer import ChatRenderer
from runner_server.engine.backend import ModelHandle
from runner_server.errors import PromptTooLong


async def chat_draft(
    renderer: ChatRenderer, model: ModelHandle, request: pb.ChatRequest
) -> tuple[GenerationDraft, Answer]:
    """Validate a request, and render and tokenize its conversation.

    Args:
        renderer: Renders templates.
        model: The model.
        request: The request.

    Returns:
        The request for the engine, and the answer, to which its output is added.

    Raises:
        InvalidField: A field is missing or out of range, or the template refuses the conversation.
        PromptTooLong: The prompt does not fit the context.
        RunnerFault: See :meth:`ChatRenderer.render`.
    """
    check = ViolationCollector()
    _check_budget(check, request, model.info.chat)
    check_required(check, request, model.info.chat)
    is_required = request.tool_choice == pb.TOOL_CHOICE_REQUIRED
    if is_required:
        check_ends(check, request.options)
    _check_tools(check, request, model.info.chat)
    conversation = await asyncio.to_thread(read_conversation, check, request)
    # Refuses all of the above, too. The prompt is replaced by the rendered one.
    draft = generation_draft(check, request, Prompt("messages", ""), model.info)
    if request.tool_choice == pb.TOOL_CHOICE_NONE:
        conversation = replace(conversation, tools=None)
    format_ = model.info.chat.answer
    if conversation.tools is None:
        format_ = format_.without_tools()
    most = model.info.context_length
    if is_required:
        draft = replace(draft, constraint=required_calls(request, format_))
    prompt = await chat_prompt(renderer, model, conversation, most, literal=request.literal)
    if prompt.fewest:
        raise PromptTooLong(prompt.fewest, most, is_least=True)
    is_limited = draft.constraint is not None or request.HasField("reasoning_budget")
    reasoning = None
    if is_limited and format_.may_reason_after(prompt.text):
        if draft.constraint:
            format_ = format_.with_calls_in_content()
        reasoning = _reasoning(request, format_, prompt.text)
    parse = partial(renderer.parse_calls, format_.tool_parser, conversation.tools or ())
    required = [tool.name for tool in request.tools] if is_required else []
    answer = Answer(format_, prompt.text, parse, required=required)
    return replace(draft, prompt=Prompt("messages", prompt.token_ids), reasoning=reasoning), answer


def _reasoning(request: pb.ChatRequest, format_: AnswerFormat, prompt: str) -> Reasoning:
    """Return what an answer's reasoning is limited to, and how it goes on after that."""
    is_open = format_.state_after(prompt) == REASONING
    budget = request.reasoning_budget if request.HasField("reasoning_budget") else None
    is_required = request.tool_choice == pb.TOOL_CHOICE_REQUIRED
    return Reasoning(format_, is_open, budget, "" if is_required else format_.content_start)


def _check_budget(check: ViolationCollector, request: pb.ChatRequest, model: ChatFormat) -> None:
    """Check the limit of the reasoning."""
    if not request.HasField("reasoning_budget"):
        return
    field, options = "reasoning_budget", request.options
    check.number(field, request.reasoning_budget, 0, MAX_INT32)
    is_known = model.answer.has_reasoning or not model.has_template
    check.require(field, is_known, "this model has no markers of reasoning; leave it out")
    may_exclude = options.min_predict > 0 and bool(options.stop_token_ids)
    text = "cannot be combined with min_predict and stop_token_ids, which may exclude the marker"
    check.require(field, not may_exclude, text)


def _check_tools(check: ViolationCollector, request: pb.ChatRequest, model: ChatFormat) -> None:
    """Check that the calls of tools in the answer can be told apart."""
    is_offered = bool(request.tools) and request.tool_choice != pb.TOOL_CHOICE_NONE
    is_known = bool(model.answer.tool_parser) or not model.has_template
    text = (
        "mlx_lm has no parser for this model's tool calls; leave them out, or set "
        "tool_parser_type in tokenizer_config.json"
    )
    check.require("tools", is_known or not is_offered, text)
