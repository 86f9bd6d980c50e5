"""A tokenizer of any size whose prompts are easy to make to length.

Byte-level BPE as Llama 3 and Qwen have it, made of rules instead of trained: every
blank with two letters after it is a token, then with three, then with four, until the
vocabulary is full. A prompt of n such words has n tokens. There are no tokens for the
pieces of multi-byte characters: a server that streams text would hold them back, and
its first token would seem late.
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
    """Writes tokenizer.json and tokenizer_config.json.

    Args:
        path: The model's directory.
        vocab_size: How many ids the model scores; the end of text comes after them.
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
