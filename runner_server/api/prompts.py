"""Tokenization in worker threads, which stops early if a text is too long."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from runner_server.engine.backend import Codec, ModelHandle
from runner_server.errors import PromptTooLong

_LONG_TEXT_CHARS = 1 << 19
"""Length above which a text is worth checking against the limit before tokenizing all of it."""


@dataclass(frozen=True)
class Prompt:
    """Prompt of a request, as text or as token ids.

    Attributes:
        field: Path of the prompt's field in the request, for errors.
        content: The text, or token ids. The ids are the message's own container, because a
            message can have millions, and their number is checked before they are copied.
        literal: Whether special tokens written in the text are text.
    """

    field: str
    content: str | Sequence[int]
    literal: bool = False


async def encode_prompt(prompt: Prompt, model: ModelHandle) -> Sequence[int]:
    """Return the token ids of a prompt, tokenizing a text.

    Raises:
        PromptTooLong: A very long text has more tokens than the context holds. Other lengths
            are not checked here.
        InvalidField: See ``Codec.encode``.
    """
    if not isinstance(prompt.content, str):
        return prompt.content
    most, literal = model.info.context_length, prompt.literal
    if fewest := await too_many(prompt.content, most, model.codec, literal=literal):
        raise PromptTooLong(fewest, most, is_least=True)
    # In a worker thread: tokenizing megabytes must not delay other calls.
    return await asyncio.to_thread(
        model.codec.encode, prompt.content, as_prompt=True, literal=literal
    )


async def too_many(text: str, most: int, codec: Codec, *, literal: bool) -> int:
    """Return a lower bound of a text's token count if it is above ``most``; otherwise 0.

    Takes time and memory in proportion to the limit, not to the text.
    """
    if len(text) <= _LONG_TEXT_CHARS:
        return 0
    fewest = await asyncio.to_thread(codec.fewest_tokens, text, most, literal=literal)
    return fewest if fewest > most else 0
