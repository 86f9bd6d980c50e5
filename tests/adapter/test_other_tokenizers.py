"""Tokenizers without a tokenizer.json, read by transformers in a child process."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend.tokenizer.codec import load_codec
from support.tokenizer_files import byte_level, leave_to_transformers, write_tokenizer

sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")

_CORPUS = ["The quick brown fox, the lazy dog", "naïve café 日本語 12 345", "a  b   c\td"] * 9
TEXTS = ["The quick fox", " a", "  two  spaces ", "naïve 日本 😀", "12345\n\nx", "<0x41> a<b"]


def _codec(path: Path) -> Any:
    return load_codec(path, {"model_type": "llama", "eos_token_id": [7]})[0]


def _sentencepiece(path: Path, **settings: Any) -> Any:
    """Write a directory like the first Llama 2 and Mistral; return the SentencePiece model."""
    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS),
        model_writer=data,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    (path / "tokenizer.model").write_bytes(data.getvalue())
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(names | settings))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return sentencepiece.SentencePieceProcessor(model_proto=data.getvalue())


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_match_sentencepiece(tmp_path: Path, *, legacy: bool) -> None:
    theirs = _sentencepiece(tmp_path, add_bos_token=True, legacy=legacy)
    codec = _codec(tmp_path)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert codec.encode(text, as_prompt=False) == ids, text
        assert codec.encode(text, as_prompt=True) == [theirs.bos_id(), *ids], text
        assert codec.decode(ids) == text


def test_vocabulary_and_merges_are_read(tmp_path: Path) -> None:
    file = byte_level()
    write_tokenizer(tmp_path, file, {"bos_token": "<s>", "eos_token": "</s>"})
    leave_to_transformers(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    codec, ends = load_codec(tmp_path, {"model_type": "gpt2", "eos_token_id": [7]})
    assert ends == {1, 7}
    for text in TEXTS:
        assert codec.encode(text, as_prompt=False) == file.encode(text).ids, text


def test_transformers_is_not_imported_by_the_loading_process(
    model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    for file in model_dir().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    leave_to_transformers(tmp_path)
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from runner_server.mlx_backend.tokenizer.codec import load_codec\n"
        "codec, ends = load_codec(Path(sys.argv[1]), {'model_type': 'gpt2'})\n"
        "print(json.dumps([codec.encode('fox', as_prompt=False), 'transformers' in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    ids, is_imported = json.loads(done.stdout)
    assert ids
    assert not is_imported
