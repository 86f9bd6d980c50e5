"""Log probabilities in the two forms of OpenAI's interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlxrunner.v1 import runner_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Token = pb.TokenLogprob | pb.TopLogprob


def without_end(entries: Iterable[pb.TokenLogprob], *, is_last: bool) -> Iterator[pb.TokenLogprob]:
    """Yield the tokens of the text, without the one after it.

    Args:
        entries: The tokens of a message.
        is_last: Whether it is the last message, whose last token may have ended the text.
    """
    entries = list(entries)
    if is_last and entries and not entries[-1].bytes:
        entries.pop()
    yield from entries


def chat_logprobs(entries: Iterable[pb.TokenLogprob]) -> dict[str, Any]:
    """Return tokens in the form of `/v1/chat/completions`."""
    content = [
        {**_entry(each), "top_logprobs": [_entry(top) for top in each.top]} for each in entries
    ]
    return {"content": content, "refusal": None}


def _entry(token: Token) -> dict[str, Any]:
    return {"token": _text(token), "logprob": token.logprob, "bytes": list(token.bytes)}


def _text(token: Token) -> str:
    # Unlike its `text`, which is empty for a part of a character, and for the end of the text.
    return token.bytes.decode(errors="replace")


class CompletionLogprobs:
    """Tokens in the form of `/v1/completions`, with the place of each in the text."""

    def __init__(self) -> None:
        self._offset = 0

    def add(self, entries: Iterable[pb.TokenLogprob]) -> dict[str, Any]:
        """Return the next tokens of a text."""
        entries = list(entries)
        offsets = []
        for entry in entries:
            offsets.append(self._offset)
            self._offset += len(entry.text)
        return {
            "tokens": [_text(entry) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [_top(entry) for entry in entries],
            "text_offset": offsets,
        }


def _top(entry: pb.TokenLogprob) -> dict[str, float]:
    """Return the most likely tokens and the one drawn. Of equal texts, the likelier counts."""
    found: dict[str, float] = {}
    for top in entry.top:
        found.setdefault(_text(top), top.logprob)
    found.setdefault(_text(entry), entry.logprob)
    return found
