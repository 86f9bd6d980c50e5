"""Rule-based tokenizer of any vocabulary size, for prompts of an exact length.

Byte-level BPE as in Llama 3 and Qwen, but constructed rather than trained: a space followed by
each combination of one letter, then two, three and four, until the vocabulary is full. A prompt of
n such words has n tokens. No token is a fragment of a multi-byte character: a server that
streams text would hold it back, which would delay its first token.
"""

from __future__ import annotations

import json
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase

EOS = {"content": "<|never|>"}
_BLANK = "Ġ"
_PRINTABLE = [chr(code) for code in range(33, 127)]


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        path: Model directory.
        vocab_size: Number of token ids of the model; the end-of-text id follows them.
    """
    alphabet = [*_PRINTABLE, _BLANK, "Ċ"]
    merged = [
        (_BLANK + "".join(letters[:-1]), letters[-1])
        for length in range(1, 5)
        for letters in product(ascii_lowercase, repeat=length)
    ]
    merges = list(islice(merged, vocab_size - len(alphabet)))
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    eos = {
        **EOS,
        "id": vocab_size,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [eos],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS["content"]}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
