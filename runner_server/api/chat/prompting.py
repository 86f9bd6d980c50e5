"""Prompts of conversations, rendered and tokenized."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from runner_server.api.chat.literal import encode_literal
from runner_server.api.prompts import too_many
from runner_server.chat.renderer import ChatRenderer, Conversation
from runner_server.engine.backend import ModelHandle


@dataclass(frozen=True)
class ChatPrompt:
    """Prompt of a conversation.

    Attributes:
        text: The text that the template gives.
        token_ids: Its tokens, without a beginning that the template has not written.
        fewest: If not 0, a lower bound of the tokens' number, which is above the limit; there are
            no tokens then.
    """

    text: str
    token_ids: Sequence[int]
    fewest: int = 0


async def chat_prompt(
    renderer: ChatRenderer,
    model: ModelHandle,
    conversation: Conversation,
    most: int,
    *,
    literal: bool,
) -> ChatPrompt:
    """Render a conversation and tokenize the text.

    Args:
        renderer: Renders templates.
        model: The model.
        conversation: The conversation.
        most: Number of tokens above which a very long text is not tokenized.
        literal: Whether special tokens written in the conversation are text.

    Raises:
        RunnerFault: See :meth:`ChatRenderer.render` and :func:`encode_literal`.
    """
    text = await renderer.render(model.info.chat, conversation)
    # A special token that is text has no fewer tokens than one that counts as such.
    if fewest := await too_many(text, most, model.codec, literal=False):
        return ChatPrompt(text, (), fewest)
    if literal:
        return ChatPrompt(text, await encode_literal(renderer, model, conversation, text))
    return ChatPrompt(text, await asyncio.to_thread(model.codec.encode, text, as_prompt=False))
