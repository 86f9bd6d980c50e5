"""Requests for answers: a conversation, completed like the prompt that it is rendered to."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.api.chat.conversation import conversation_of
from runner_server.api.chat.prompting import chat_prompt
from runner_server.api.generation import GenerationDraft
from runner_server.api.prompts import Prompt
from runner_server.api.validation import generation_draft
from runner_server.api.violations import ViolationCollector
from runner_server.chat.answer import Answer
from runner_server.chat.format import AnswerFormat, ChatFormat
from runner_server.chat.renderer import ChatRenderer, Conversation
from runner_server.engine.backend import ModelHandle
from runner_server.errors import InvalidField, PromptTooLong


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
    # Replaced by the rendered prompt.
    unrendered = Prompt("messages", "")
    draft = generation_draft(ViolationCollector(), request, unrendered, model.info)
    conversation = await asyncio.to_thread(conversation_of, request)
    if request.tool_choice == pb.TOOL_CHOICE_NONE:
        conversation = replace(conversation, tools=None)
    format_ = _format(model.info.chat, conversation)
    most = model.info.context_length
    prompt = await chat_prompt(renderer, model, conversation, most)
    if prompt.fewest:
        raise PromptTooLong(prompt.fewest, most, is_least=True)
    parse = partial(renderer.parse_calls, format_.tool_parser, conversation.tools or ())
    answer = Answer(format_, prompt.text, parse)
    return replace(draft, prompt=Prompt("messages", prompt.token_ids)), answer


def _format(model: ChatFormat, conversation: Conversation) -> AnswerFormat:
    """Return the format of the answer, without tool calls if the conversation has no tools.

    Raises:
        InvalidField: The conversation has tools, and the model's calls cannot be told apart.
    """
    if conversation.tools is None:
        return model.answer.without_tools()
    if model.has_template and not model.answer.tool_parser:
        problem = (
            "mlx_lm has no parser for this model's tool calls; leave them out, or set "
            "tool_parser_type in tokenizer_config.json"
        )
        raise InvalidField([("tools", problem)])
    return model.answer
