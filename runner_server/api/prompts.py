"""Tokenization off the event loop, stopping early on texts too long for the limit."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from runner_server.engine.backend import Codec, ModelHandle
from runner_server.errors import PromptTooLong

_LONG_TEXT_CHARS = 1 << 19
"""Length from which checking a text against the limit before tokenizing all of it pays off."""


@dataclass(frozen=True)
class Prompt:
    """Prompt of a request, not tokenized yet.

    Attributes:
        field: Path of the request's field that holds the prompt, named in errors.
        content: The text, or token ids. The ids are the message's own container: a message can
            hold millions, which are copied only once their number is checked.
    """

    field: str
    content: str | Sequence[int]


async def encode_prompt(prompt: Prompt, model: ModelHandle) -> Sequence[int]:
    """Return the token ids of a prompt; tokenize a text, return ids as given.

    Raises:
        PromptTooLong: A part of the text already has more tokens than the context holds.
    """
    if not isinstance(prompt.content, str):
        return prompt.content
    most = model.info.context_length
    if fewest := await too_many(prompt.content, most, model.codec):
        raise PromptTooLong(fewest, most, is_least=True)
    # In a worker thread: tokenizing megabytes must not delay other calls.
    return await asyncio.to_thread(model.codec.encode, prompt.content, as_prompt=True)


async def too_many(text: str, most: int, codec: Codec) -> int:
    """Return a lower bound of a text's token count if above ``most``; otherwise 0.

    Time and memory grow with the limit, not with the text.
    """
    if len(text) <= _LONG_TEXT_CHARS:
        return 0
    fewest = await asyncio.to_thread(codec.fewest_tokens, text, most)
    return fewest if fewest > most else 0
