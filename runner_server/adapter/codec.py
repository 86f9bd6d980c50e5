"""The model's tokenizer, usable from any thread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner_server.adapter._panics import NO_PANICS
from runner_server.adapter._plain_tokenizer import read_plain_tokenizer
from runner_server.adapter.token_bytes import bytes_of_tokens
from runner_server.adapter.transformers_tokenizer import TokenizerError, read_with_transformers
from runner_server.errors import ModelUnsupported

_PART_CHARS = 1 << 17
"""Of a very long text, what is split first to see whether the rest need be."""

_SAMPLE = "A naïve text, 日本 😀:\n\tdef f(x): return 12.5  # \0 aaaa"
_MAX_ID = 2**31 - 1

_LONG = 256
"""Tokens from which on decoding should not keep other threads from running."""


class FastCodec:
    """Wraps the Rust tokenizer itself.

    The transformers object around it changes its state when it encodes and raises
    "Already borrowed" between threads; the tokenizer does neither once truncation
    and padding are off.

    Args:
        tokenizer: A ``tokenizers.Tokenizer``; nobody else may hold it.
        bos_token: The beginning-of-text token, if the model has one.
    """

    def __init__(self, tokenizer: Any, bos_token: str | None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._bos_token = bos_token
        self._bytes_of = bytes_of_tokens(tokenizer)

    def encode(self, text: str, *, as_prompt: bool) -> list[int]:
        """Splits text into ids; see ``Codec.encode``."""
        has_bos = bool(self._bos_token) and text.startswith(self._bos_token or "")
        add = as_prompt and not has_bos
        # Only the batch form lets other threads run meanwhile.
        with NO_PANICS:
            ids: list[int] = self._tokenizer.encode_batch([text], add_special_tokens=add)[0].ids
        return ids

    def fewest_tokens(self, text: str, enough: int) -> int:
        """See ``Codec.fewest_tokens``.

        A beginning of a text never has twice the tokens of the whole: what follows
        changes how the last word of the beginning is split, and no more.
        """
        size = _PART_CHARS
        while size < len(text):
            count = len(self.encode(text[:size], as_prompt=False))
            if count > 2 * enough:
                return count // 2
            size *= 2
        return 0

    def decode(self, ids: Sequence[int]) -> str:
        """Joins ids into text; see ``Codec.decode``."""
        ids = list(ids)
        text: str
        with NO_PANICS:
            if len(ids) > _LONG:
                # As above; a few tokens take less time than handing over to another thread.
                (text,) = self._tokenizer.decode_batch([ids], skip_special_tokens=False)
            else:
                text = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def token_bytes(self, token_id: int) -> bytes | None:
        """See ``Codec.token_bytes``."""
        return self._bytes_of(token_id)


def load_codec(path: Path, config: dict[str, Any]) -> tuple[FastCodec, frozenset[int]]:
    """Reads the tokenizer of a model directory.

    Args:
        path: The directory.
        config: The model's configuration.

    Returns:
        The codec and all ids that end a text.

    Raises:
        ModelUnsupported: There is no tokenizer, or it needs code of its own to run.
    """
    plain = read_plain_tokenizer(path, config)
    if plain is None:
        codec, eos_token_ids = _load_with_transformers(path, config.get("eos_token_id"))
    else:
        _require_vocabulary(plain.tokenizer, path)
        codec, eos_token_ids = FastCodec(plain.tokenizer, plain.bos_token), plain.eos_token_ids
    _try_out(codec, path)
    return codec, eos_token_ids


def _try_out(codec: FastCodec, path: Path) -> None:
    """Splits and joins a text: some tokenizers can be read and not be used."""
    try:
        ids = [*codec.encode(_SAMPLE, as_prompt=True), *codec.encode(_SAMPLE, as_prompt=False)]
        for part in (ids, *([id_] for id_ in ids)):
            codec.decode(part)
    except Exception as error:
        raise ModelUnsupported(
            f"the tokenizer in {path} does not work ({type(error).__name__}: {error})",
            model=str(path),
        ) from error
    if max(ids, default=0) > _MAX_ID:
        raise ModelUnsupported(
            f"the tokenizer in {path} makes token {max(ids)} of a text, which no vocabulary has",
            model=str(path),
        )


def _load_with_transformers(path: Path, eos_token_ids: object) -> tuple[FastCodec, frozenset[int]]:
    try:
        read = read_with_transformers(path, eos_token_ids)
    except TokenizerError as error:
        raise ModelUnsupported(str(error), model=str(path)) from error
    _require_vocabulary(read.tokenizer, path)
    return FastCodec(read.tokenizer, read.bos_token), read.eos_token_ids


def _require_vocabulary(backend: Any, path: Path) -> None:
    # Where there are no files, transformers may make a tokenizer of special tokens only.
    if backend.get_vocab_size() <= len(backend.get_added_tokens_decoder()):
        raise ModelUnsupported(
            f"there is no tokenizer in {path}; expected tokenizer.json and tokenizer_config.json",
            model=str(path),
        )
