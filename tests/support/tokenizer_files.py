"""Small tokenizers of common kinds, built with the tokenizers library."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

Make = Callable[[], Tokenizer]

_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = ["The quick brown fox, the lazy dog: naïve café 日本語 12 345 you're I'LL\n\n x"] * 3


def byte_level() -> Tokenizer:
    """Return a byte-level tokenizer, as in GPT-2 and Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, ["<s>", "</s>", "<unk>"], pre_tokenizers.ByteLevel.alphabet())


def digits_apart() -> Tokenizer:
    """Return a byte-level tokenizer with a step lost on conversion to GPT2Tokenizer.

    The class builds a pre-tokenizer of its own, without the splitting of digits.
    """
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def qwen() -> Tokenizer:
    """Return a tokenizer as in Qwen 2 and 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _trained(tokenizer, [], pre_tokenizers.ByteLevel.alphabet())
    # As in the real models: beyond the vocabulary, and not all of them special.
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def gemma() -> Tokenizer:
    """Return a tokenizer as in Gemma: spaces are letters, unknown letters are bytes, BOS."""
    tokenizer = _byte_fallback(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return with_template(tokenizer, "<bos> $A")


def llama2() -> Tokenizer:
    """Return a tokenizer as in Llama 2: like Gemma's, with a space before every text."""
    tokenizer = _byte_fallback(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return with_template(tokenizer, "<s> $A")


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """Put special tokens around every text by a template; return the tokenizer."""
    special = [(text, tokenizer.token_to_id(text)) for text in template.split() if text != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} $B", special_tokens=[*dict.fromkeys(special)]
    )
    return tokenizer


KINDS: dict[str, Make] = {
    "byte level": byte_level,
    "digits apart": digits_apart,
    "Qwen": qwen,
    "Gemma": gemma,
    "Llama 2": llama2,
}


def write_tokenizer(path: Path, tokenizer: Tokenizer, settings: dict[str, Any] | None) -> None:
    """Write tokenizer.json, and tokenizer_config.json unless ``settings`` is None."""
    tokenizer.save(str(path / "tokenizer.json"))
    if settings is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(settings))


def write_large_tokenizer(path: Path, pieces: int = 262_144) -> None:
    """Write a tokenizer.json like Gemma 3's: 32 MiB, two merges per piece.

    Nearly every piece has three letters and is the sum of two others in two ways.
    """
    letters = [chr(0x4E00 + i) for i in range(64)]
    words = [*letters, *(a + b for a in letters for b in letters)]
    for word in words[len(letters) :]:
        words.extend(word + letter for letter in letters)
        if len(words) > pieces:
            break
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {word: id_ for id_, word in enumerate([*special, *words][:pieces])}
    made = [word for word in words if word in vocabulary and len(word) in (2, 3)]
    merges = [pair for word in made for pair in _halves(word)]
    file = json.loads(gemma().to_str())
    model = {**file["model"], "vocab": vocabulary, "merges": merges}
    file |= {"model": model, "added_tokens": [_added(t, i) for i, t in enumerate(special[:4])]}
    # As large as indented JSON, and written ten times as fast.
    text = json.dumps(file, ensure_ascii=False, separators=(",\n        ", ": "))
    (path / "tokenizer.json").write_text(text)
    settings = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def _halves(word: str) -> list[tuple[str, str]]:
    return list(dict.fromkeys(((word[0], word[1:]), (word[:-1], word[-1]))))


def _added(text: str, id_: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id_, "content": text, **flags, "special": True}


def leave_to_transformers(path: Path) -> None:
    """Replace a byte-level tokenizer.json by files only transformers reads."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.model.save(str(path))
    (path / "tokenizer.json").unlink()
    file = path / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    file.write_text(json.dumps(settings))


def added_tokens_decoder(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return ``added_tokens_decoder`` in the form written by transformers."""
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    found = tokenizer.get_added_tokens_decoder()
    return {
        str(id_): {name: getattr(token, name) for name in names} for id_, token in found.items()
    }


def _byte_fallback(special: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))  # noqa: S106 - not a password
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _trained(tokenizer, special, [])
    file = json.loads(tokenizer.to_str())
    vocabulary = file["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    return Tokenizer.from_str(json.dumps(file))


def _trained(tokenizer: Tokenizer, special: Sequence[str], alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer
