"""Tokenization off the event loop, stopping early on texts too long for the limit."""

from __future__ import annotations

import asyncio

from runner_server.engine.backend import Codec, ModelHandle
from runner_server.errors import PromptTooLong

_LONG_TEXT_CHARS = 1 << 19
"""Length from which checking a text against the limit before tokenizing all of it pays off."""


async def encode_prompt(text: str, model: ModelHandle) -> list[int]:
    """Return the tokens of a prompt.

    Raises:
        PromptTooLong: A part of the prompt already has more tokens than the context holds.
    """
    most = model.info.context_length
    if fewest := await too_many(text, most, model.codec):
        raise PromptTooLong(fewest, most, is_least=True)
    # In a worker thread: tokenizing megabytes must not delay other calls.
    return await asyncio.to_thread(model.codec.encode, text, as_prompt=True)


async def too_many(text: str, most: int, codec: Codec) -> int:
    """Return a lower bound of a text's token count if above ``most``; otherwise 0.

    Time and memory grow with the limit, not with the text.
    """
    if len(text) <= _LONG_TEXT_CHARS:
        return 0
    fewest = await asyncio.to_thread(codec.fewest_tokens, text, most)
    return fewest if fewest > most else 0
