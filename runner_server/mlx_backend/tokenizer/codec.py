"""The model's tokenizer, usable from any thread."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from runner_server.errors import ModelUnsupported
from runner_server.mlx_backend.tokenizer.literal import LiteralTokenizer, split
from runner_server.mlx_backend.tokenizer.marked import MarkedTokenizer
from runner_server.mlx_backend.tokenizer.panics import NO_PANICS
from runner_server.mlx_backend.tokenizer.settings import TokenizerSettings, read_settings
from runner_server.mlx_backend.tokenizer.token_bytes import bytes_of_tokens, depends_on_neighbours
from runner_server.mlx_backend.tokenizer.tokenizer_file import FILE, read_tokenizer_file
from runner_server.mlx_backend.tokenizer.transformers_tokenizer import read_with_transformers
from runner_server.mlx_backend.upstream.names import default_end_ids

_PART_CHARS = 1 << 17
"""Characters of a very long text that are tokenized first, to estimate its token count."""

_SAMPLE = "A naïve text, 日本 😀:\n\tdef f(x): return 12.5  # \0 aaaa"
_MAX_ID = 2**31 - 1

_LONG = 256
"""Number of tokens above which decoding takes long enough to release the GIL."""


class FastCodec:
    """Implements ``Codec`` with the Rust tokenizer, thread-safe.

    The transformers object around a tokenizer changes its state when it encodes, and raises
    "Already borrowed" between threads. The Rust tokenizer does neither once truncation and padding
    are off. BPE dropout, which splits texts at random for training, is switched off too.

    A prompt gets the tokens that the tokenizer puts before a text but not those after it, because
    an end-of-text token would end the text that the model should continue. A text that already
    begins with those tokens, or with the beginning-of-text token, is left unchanged.

    Args:
        tokenizer: A ``tokenizers.Tokenizer``, not shared with other code.
        prefix: The tokens to put before a prompt; see :func:`prompt_prefix`.
        bos_id: The beginning-of-text token, if the model has one.
        suffix: The tokens to put after a whole text; see :func:`text_suffix`.
    """

    def __init__(
        self,
        tokenizer: Any,
        prefix: Sequence[int],
        bos_id: int | None,
        suffix: Sequence[int] = (),
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
        self._tokenizer = tokenizer
        self._prefix = list(prefix)
        self._suffix = list(suffix)
        self._bos_id = bos_id
        self._bytes_of = bytes_of_tokens(tokenizer)
        # A model has one template, or several that come here as one text.
        self._marked = lru_cache(1)(partial(MarkedTokenizer, tokenizer))

    def encode(self, text: str, *, as_prompt: bool, literal: bool = False) -> list[int]:
        """Split text into ids; see ``Codec.encode``."""
        ids = self._literal.encode(text) if literal else split(self._tokenizer, text)
        if not as_prompt or self._has_prefix(ids):
            return ids
        return self._prefix + ids

    def encode_whole(self, text: str, *, literal: bool = False) -> list[int]:
        """Split a whole text into ids; see ``Codec.encode_whole``.

        As transformers does, even if the text already begins or ends with the tokens around it.
        """
        return self._prefix + self.encode(text, as_prompt=False, literal=literal) + self._suffix

    @cached_property
    def _literal(self) -> LiteralTokenizer:
        return LiteralTokenizer(self._tokenizer)

    def marked(self, template: str) -> MarkedTokenizer:
        """Return the tokenizer for texts with marks; see ``Codec.marked``."""
        return self._marked(template)

    def _has_prefix(self, ids: Sequence[int]) -> bool:
        return ids[: len(self._prefix)] == self._prefix or (
            self._bos_id is not None and ids[:1] == [self._bos_id]
        )

    def fewest_tokens(self, text: str, enough: int, *, literal: bool = False) -> int:
        """Return a lower bound of the token count; see ``Codec.fewest_tokens``.

        A prefix of a text never has more than twice the tokens of the whole text, because the rest
        only changes how the last word of the prefix is split.
        """
        size = _PART_CHARS
        while size < len(text):
            count = len(self.encode(text[:size], as_prompt=False, literal=literal))
            if count > 2 * enough:
                return count // 2
            size *= 2
        return 0

    def decode(self, ids: Sequence[int]) -> str:
        """Join ids into text; see ``Codec.decode``."""
        ids = list(ids)
        text: str
        with NO_PANICS:
            if len(ids) > _LONG:
                # Releases the GIL. Decoding few tokens takes less time than switching threads.
                (text,) = self._tokenizer.decode_batch([ids], skip_special_tokens=False)
            else:
                text = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def has_token(self, text: str) -> bool:
        """Return whether the vocabulary has a token of this text."""
        return self._tokenizer.token_to_id(text) is not None

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes of a token; see ``Codec.token_bytes``."""
        return self._bytes_of(token_id)

    def vocabulary(self) -> dict[str, int]:
        """Return the id of every token by its text, as the tokenizer's file writes it."""
        found: dict[str, int] = self._tokenizer.get_vocab()
        return found

    @property
    def knows_bytes(self) -> bool:
        """True if the bytes of a token do not depend on its neighbours."""
        return not depends_on_neighbours(self._tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        size: int = self._tokenizer.get_vocab_size()
        return size

    @property
    def special_ids(self) -> list[int]:
        """The ids of special tokens, such as the end of a text or of a turn."""
        added = self._tokenizer.get_added_tokens_decoder()
        return [id_ for id_, token in added.items() if token.special]


def load_codec(path: Path, config: dict[str, Any]) -> tuple[FastCodec, frozenset[int]]:
    """Read the tokenizer of a model directory.

    Args:
        path: The directory.
        config: The model's configuration; its ``eos_token_id`` has the ids of all files.

    Returns:
        The codec, and the ids that end a text.

    Raises:
        ModelUnsupported: The directory has no tokenizer, or one that does not work without running
            the directory's code.
    """
    ends = frozenset(config.get("eos_token_id") or default_end_ids(config))
    settings = read_settings(path)
    if (path / FILE).is_file():
        tokenizer = read_tokenizer_file(path, settings)
    else:
        tokenizer, settings = read_with_transformers(path, settings)
    _require_vocabulary(tokenizer, path)
    ends |= {*_ids_of(tokenizer, settings.eos_token)}
    return _codec(tokenizer, settings, path), ends


def _ids_of(tokenizer: Any, token: str | None) -> list[int]:
    id_ = None if token is None else tokenizer.token_to_id(token)
    return [] if id_ is None else [id_]


def _codec(tokenizer: Any, settings: TokenizerSettings, path: Path) -> FastCodec:
    """Create the codec and test it, because some tokenizers can be read but not used."""
    bos_id = next(iter(_ids_of(tokenizer, settings.bos_token)), None)
    end = _ids_of(tokenizer, settings.eos_token) if settings.adds_eos else []
    try:
        prefix = prompt_prefix(tokenizer, bos_id, settings.adds_bos)
        codec = FastCodec(tokenizer, prefix, bos_id, text_suffix(tokenizer, end))
        ids = codec.encode(_SAMPLE, as_prompt=True)
        for part in (ids, *([id_] for id_ in ids)):
            codec.decode(part)
    except Exception as error:
        raise ModelUnsupported(
            f"the tokenizer in {path} does not work ({type(error).__name__}: {error})",
            model=str(path),
        ) from error
    if max(ids, default=0) > _MAX_ID:
        raise ModelUnsupported(
            f"the tokenizer in {path} produces token {max(ids)}, which no vocabulary has",
            model=str(path),
        )
    return codec


def prompt_prefix(tokenizer: Any, bos_id: int | None, adds_bos: bool | None) -> list[int]:
    """Return the tokens to put before a prompt.

    These are the tokens of the tokenizer's post-processor; ``add_bos_token`` adds or removes the
    beginning-of-text token. transformers 5 ignores that setting if there is a ``tokenizer.json``.
    Here both of its values have an effect, as in llama.cpp and in most classes of transformers 4.
    With true, prompts for the real files of DeepSeek V3, whose post-processor adds nothing, get the
    token that the model was trained with. With false, the model's author or user has switched off
    the post-processor's token.

    Args:
        tokenizer: A ``tokenizers.Tokenizer``.
        bos_id: The beginning-of-text token.
        adds_bos: The value of ``add_bos_token``; None if it is not set.
    """
    with NO_PANICS:
        encoding = tokenizer.encode(_SAMPLE)
    # The mask marks tokens that were added around the text.
    pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    prefix = [id_ for id_, _ in takewhile(lambda pair: pair[1], pairs)]
    if bos_id is None or adds_bos is None:
        return prefix
    if not adds_bos:
        return [id_ for id_ in prefix if id_ != bos_id]
    return prefix if bos_id in prefix else [bos_id, *prefix]


def text_suffix(tokenizer: Any, end: Sequence[int]) -> list[int]:
    """Return the tokens to put after a whole text, as models that embed need them.

    These are the tokens of the tokenizer's post-processor, and the end-of-text token that
    ``add_eos_token`` asks for. transformers 5 ignores that setting if there is a
    ``tokenizer.json``, and so pools another token of e5-mistral than it was trained with
    (https://github.com/embeddings-benchmark/mteb/pull/5237).

    Args:
        tokenizer: A ``tokenizers.Tokenizer``.
        end: The end-of-text token if ``add_eos_token`` is true.
    """
    with NO_PANICS:
        encoding = tokenizer.encode(_SAMPLE)
    pairs = zip(reversed(encoding.ids), reversed(encoding.special_tokens_mask), strict=True)
    suffix = [id_ for id_, _ in takewhile(lambda pair: pair[1], pairs)][::-1]
    return suffix if {*end} <= {*suffix} else [*suffix, *end]


def _require_vocabulary(tokenizer: Any, path: Path) -> None:
    # Without files, transformers may create a tokenizer that has only special tokens.
    if tokenizer.get_vocab_size() <= len(tokenizer.get_added_tokens_decoder()):
        raise ModelUnsupported(
            f"there is no tokenizer in {path}; expected tokenizer.json and tokenizer_config.json",
            model=str(path),
        )
