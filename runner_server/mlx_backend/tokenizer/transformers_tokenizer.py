"""Reading of other tokenizers than ``tokenizer.json``, with transformers in a child process.

Importing transformers takes about a second and 40 to 75 MiB, which the process cannot free. A
short-lived child therefore reads the tokenizer, and prints it in the format of ``tokenizer.json``
(``tokenizers.Tokenizer.to_str``).
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers

from runner_common.interpreter import interpreter
from runner_server.errors import ModelUnsupported
from runner_server.mlx_backend.tokenizer.panics import NO_PANICS
from runner_server.mlx_backend.tokenizer.settings import TokenizerSettings
from runner_server.mlx_backend.upstream.names import load_tokenizer

logger = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 120.0

_SAMPLES = ("The quick fox", " a", "  two  spaces ", "naïve 日本 😀 ①", "12345\n\nx\ty", "\0", "")
"""Texts that show how a tokenizer treats spaces, characters outside its vocabulary, and numbers."""


def read_with_transformers(
    path: Path, settings: TokenizerSettings
) -> tuple[Any, TokenizerSettings]:
    """Read a tokenizer with transformers.

    Args:
        path: The model's directory.
        settings: The settings from the model's files.

    Returns:
        A ``tokenizers.Tokenizer``, and the settings with transformers' values for the special
        tokens.

    Raises:
        ModelUnsupported: The tokenizer cannot be loaded, or has no form that works without
            transformers.
    """
    answer = _ask_child(path) or _read(path)
    if problem := answer.get("problem"):
        raise ModelUnsupported(problem, model=str(path))
    with NO_PANICS:
        tokenizer = Tokenizer.from_str(answer["tokenizer"])
    # The only setting that the format lacks.
    tokenizer.encode_special_tokens = answer["encode_special_tokens"]
    named = {key: answer[key] for key in ("bos_token", "eos_token")}
    return tokenizer, replace(settings, **named)


def _ask_child(path: Path) -> dict[str, Any] | None:
    """Return the answer of a child process; None if the child failed."""
    try:
        command = [interpreter(), "-P", "-m", __name__, str(path)]
        done = subprocess.run(
            command,
            env=os.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_SECONDS,
            check=True,
        )
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        logger.warning(
            "the tokenizer in %s is read in this process, because a child process failed: %s",
            path,
            error,
        )
        return None
    return answer


def _read(path: Path) -> dict[str, Any]:
    """Return the tokenizer as a JSON object, or a problem."""
    try:
        with NO_PANICS:
            wrapper = _load_sentencepiece(path) or _load(path)
    except Exception as error:  # noqa: BLE001 - becomes the answer
        # Only the first line, because some messages of transformers fill a page.
        problem = next(iter(str(error).strip().splitlines()), "")
        return {
            "problem": f"the tokenizer in {path} cannot be loaded ({type(error).__name__}: "
            f"{problem}); expected tokenizer.json, or files that transformers can read"
        }
    backend = getattr(wrapper, "backend_tokenizer", None)
    if backend is None:
        return {
            "problem": f"the tokenizer in {path} has no tokenizer.json form; convert it with "
            "transformers"
        }
    return {
        "tokenizer": backend.to_str(),
        "encode_special_tokens": backend.encode_special_tokens,
        "bos_token": wrapper.bos_token,
        "eos_token": wrapper.eos_token,
    }


def _load(path: Path) -> Any:
    # With None, transformers would ask on the terminal whether to run the directory's code.
    return load_tokenizer(path, {"trust_remote_code": False})


def _load_sentencepiece(path: Path) -> Any:
    """Return a conversion of a SentencePiece model with the same ids as SentencePiece.

    transformers has several conversions, and the right one differs between releases: the generic
    class of 5.7 gets every text wrong, and ``LlamaTokenizer`` of all releases loses a space in
    front of a text.

    Returns:
        None if the directory has no such model, or if no conversion is right.
    """
    theirs = _sentencepiece(path / "tokenizer.model")
    if theirs is None:
        return None
    expected = [theirs.encode(text) for text in _SAMPLES]
    for convert in (_load_generic, _load, _load_with_steps):
        wrapper = convert(path)
        encode = wrapper.backend_tokenizer.encode
        if [encode(text, add_special_tokens=False).ids for text in _SAMPLES] == expected:
            return wrapper
    return None


def _sentencepiece(file: Path) -> Any:
    """Return the SentencePiece model in a file; None if there is none."""
    if not file.is_file():
        return None
    sentencepiece = importlib.import_module("sentencepiece")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError):
        return None


def _load_generic(path: Path) -> Any:
    """Load with the generic class, which takes the tokenizer's steps from the model's settings."""
    generic = importlib.import_module("transformers").TokenizersBackend
    return generic.from_pretrained(path, trust_remote_code=False, legacy=True)


def _load_with_steps(path: Path) -> Any:
    """Load with the named class, then use the steps of Llama 2's published file."""
    wrapper = _load(path)
    tokenizer = wrapper.backend_tokenizer
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = None
    return wrapper


def main() -> int:
    """Print the tokenizer of the directory on the command line; return the exit code."""
    print(json.dumps(_read(Path(sys.argv[1]))))  # noqa: T201 - the answer
    return 0


if __name__ == "__main__":
    sys.exit(main())
