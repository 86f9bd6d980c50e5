"""Texts and bytes of the tokens of a prompt, for their log probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from runner_server.engine.logprobs import PromptLogprobs, TokenLogprob
from runner_server.engine.output.text import StreamDecoder
from runner_server.engine.output.token_text import Decoder, TokenText, TokenTexts


class PromptTexts:
    """Follows a prompt token by token from the second one on.

    The texts of all tokens joined are the text of the prompt behind its first token.

    Args:
        codec: The tokenizer.
        prompt_ids: The prompt.
    """

    def __init__(self, codec: Decoder, prompt_ids: Sequence[int]) -> None:
        self._decoder = StreamDecoder(codec.decode, prompt_ids[:1])
        # Nothing ends the text of a prompt: end tokens have their own text there.
        self._texts = TokenTexts(codec, prompt_ids[:1], frozenset())
        self._left = len(prompt_ids) - 1

    def read(
        self, part: PromptLogprobs
    ) -> Iterator[tuple[TokenLogprob, TokenText, list[TokenText]]]:
        """Yield the next entries, each with the texts of ``TokenTexts.read``."""
        for entry in part.entries():
            text = self._decoder.push(entry.token_id)
            self._left -= 1
            if not self._left:
                text += self._decoder.flush()
            told = TokenLogprob(entry.token_id, entry.logprob, entry.top, text)
            own, others = self._texts.read(told)
            yield told, own, others
