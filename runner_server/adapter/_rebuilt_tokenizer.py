"""Tokenizer classes that transformers builds in Python from vocabulary and merges alone.

Such a class brings its own steps around the model of ``tokenizer.json`` and adds the
tokens anew, one by one. Where the file has the same steps, and tokens that get the
same ids again, the outcome is the file as it stands. The steps are those of
transformers 5.23; the tests compare the two.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

_LOCAL = {"trim_offsets"}
"""Options of steps that change where tokens stand in the text, and not which they are."""

_ENCODING_ONLY = {"add_prefix_space", "trim_offsets", "use_regex"}

_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class RebuiltClass:
    """What a class of transformers builds.

    Attributes:
        model_types: The models for which it is taken if a directory names it.
        defaults: Tokens that it has even where the directory names none.
        byte_fallback: Whether the model makes bytes of unknown characters.
        normalizer: That step as the file writes it.
        pre_tokenizer: That step.
        decoder: That step.
    """

    model_types: frozenset[str]
    defaults: dict[str, str]
    byte_fallback: bool
    normalizer: Any
    pre_tokenizer: Any
    decoder: Any

    def is_as_file(
        self, tokenizer: Tokenizer, special_tokens: Iterable[str], unknown: str | None
    ) -> bool:
        """Whether building the file's tokenizer anew would change nothing.

        Args:
            tokenizer: As read from the file.
            special_tokens: The tokens with a role, which the class adds as such.
            unknown: The one that stands for what is unknown.
        """
        return (
            self._has_model(tokenizer.model, unknown if self.byte_fallback else None)
            and _step(tokenizer.normalizer, _LOCAL) == self.normalizer
            and _step(tokenizer.pre_tokenizer, _LOCAL) == self.pre_tokenizer
            and _step(tokenizer.decoder, _ENCODING_ONLY) == self.decoder
            and _gets_the_same_ids(tokenizer)
            and _are_plainly_special(tokenizer, special_tokens)
        )

    def _has_model(self, model: Any, unknown: str | None) -> bool:
        if not isinstance(model, BPE) or model.dropout or model.ignore_merges:
            return False
        if model.continuing_subword_prefix or model.end_of_word_suffix:
            return False
        found = (model.byte_fallback, model.fuse_unk, model.unk_token)
        return found == (self.byte_fallback, self.byte_fallback, unknown)


def _step(part: Any, without: set[str]) -> Any:
    return None if part is None else _strip(json.loads(part.__getstate__()), without)


def _strip(value: Any, without: set[str]) -> Any:
    if isinstance(value, list):
        return [_strip(item, without) for item in value]
    if isinstance(value, dict):
        return {key: _strip(item, without) for key, item in value.items() if key not in without}
    return value


def _gets_the_same_ids(tokenizer: Tokenizer) -> bool:
    """Whether the added tokens, added again in the order of their ids, get these ids."""
    following = tokenizer.get_vocab_size(with_added_tokens=False)
    for id_, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        expected = tokenizer.model.token_to_id(token.content)
        if expected is None:
            expected, following = following, following + 1
        if id_ != expected:
            return False
    return True


def _are_plainly_special(tokenizer: Tokenizer, special_tokens: Iterable[str]) -> bool:
    described = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    return all(
        text in described and repr(described[text]) == repr(AddedToken(text, special=True))
        for text in special_tokens
    )


QWEN2 = RebuiltClass(
    model_types=frozenset({"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"}),
    defaults=dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
    byte_fallback=False,
    normalizer={"type": "NFC"},
    pre_tokenizer={
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": _QWEN2_WORDS},
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ],
    },
    decoder={"type": "ByteLevel"},
)

GEMMA = RebuiltClass(
    model_types=frozenset({"gemma", "gemma2", "gemma3", "gemma3_text"}),
    defaults={
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "mask_token": "<mask>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    },
    byte_fallback=True,
    normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    pre_tokenizer={
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    },
    decoder={
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    },
)

REBUILT_CLASSES = {"Qwen2Tokenizer": QWEN2, "GemmaTokenizer": GEMMA}
"""By name, without the ``Fast`` that older files put behind it."""
