"""Splits text into tokens beside the event loop, and no more of it than can be of use."""

from __future__ import annotations

import asyncio

from runner_server.engine.backend import Codec, ModelHandle
from runner_server.errors import PromptTooLong

_LONG_TEXT_CHARS = 1 << 19
"""From here on it is worth a look whether a text is too long before all of it is split."""


async def encode_prompt(text: str, model: ModelHandle) -> list[int]:
    """The tokens of a prompt.

    Raises:
        PromptTooLong: It was clear from a part of it that it cannot fit the context.
    """
    most = model.info.context_length
    if fewest := await too_many(text, most, model.codec):
        raise PromptTooLong(fewest, most, is_least=True)
    # On another thread: a prompt of megabytes must not delay other calls.
    return await asyncio.to_thread(model.codec.encode, text, as_prompt=True)


async def too_many(text: str, most: int, codec: Codec) -> int:
    """How many tokens a text has at least if that is more than ``most``; else 0.

    It takes as long and as much memory as the limit asks for, not as the text does.
    """
    if len(text) <= _LONG_TEXT_CHARS:
        return 0
    fewest = await asyncio.to_thread(codec.fewest_tokens, text, most)
    return fewest if fewest > most else 0
