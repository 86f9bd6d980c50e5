"""Tokenizers that transformers has to read, in a process of their own.

Importing transformers takes about a second and 40 to 75 MiB, which a process does not give back.
So a short-lived process reads the tokenizer with it, and prints the tokenizer as the one file
that describes it (:meth:`tokenizers.Tokenizer.to_str`).
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from runner_common.import_paths import with_import_paths
from runner_common.interpreter import interpreter
from runner_server.adapter._panics import NO_PANICS
from runner_server.adapter._plain_tokenizer import PlainTokenizer
from runner_server.adapter.names import load_tokenizer

logger = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 120.0


class TokenizerError(Exception):
    """A tokenizer cannot be loaded; says why."""


def read_with_transformers(path: Path, eos_token_ids: object) -> PlainTokenizer:
    """Read a tokenizer with transformers.

    Args:
        path: The model's directory.
        eos_token_ids: What the model's configuration says of them.

    Raises:
        TokenizerError: It cannot be loaded, or has no form that needs no transformers.
    """
    answer = _ask_child(path, eos_token_ids)
    if answer is None:
        return _read(path, eos_token_ids)
    if problem := answer.get("problem"):
        raise TokenizerError(problem)
    with NO_PANICS:
        tokenizer = Tokenizer.from_str(answer["tokenizer"])
    # The one setting that the file does not have.
    tokenizer.encode_special_tokens = answer["encode_special_tokens"]
    return PlainTokenizer(tokenizer, answer["bos_token"], frozenset(answer["eos_token_ids"]))


def _ask_child(path: Path, eos_token_ids: object) -> dict[str, Any] | None:
    """Return what a process of its own has read; None if it gave no answer."""
    try:
        command = [interpreter(), "-P", "-m", __name__, str(path), json.dumps(eos_token_ids)]
        done = subprocess.run(
            command,
            env=with_import_paths(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_SECONDS,
            check=True,
        )
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        logger.warning("the tokenizer in %s is read in this process instead (%s)", path, error)
        return None
    return answer


def _read(path: Path, eos_token_ids: object) -> PlainTokenizer:
    try:
        # Explicitly false: with None transformers asks on the terminal whether to
        # run the directory's code.
        with NO_PANICS:
            wrapper = load_tokenizer(
                path, {"trust_remote_code": False}, eos_token_ids=eos_token_ids
            )
    except Exception as error:
        # transformers may go on for a page.
        problem = next(iter(str(error).strip().splitlines()), "")
        raise TokenizerError(
            f"the tokenizer in {path} cannot be loaded ({type(error).__name__}: {problem}); "
            "expected tokenizer.json and tokenizer_config.json of a known kind"
        ) from error
    backend = getattr(wrapper, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError(
            f"the tokenizer in {path} has no tokenizer.json form; convert it with transformers"
        )
    return PlainTokenizer(backend, wrapper.bos_token, frozenset(wrapper.eos_token_ids))


def main() -> int:
    """Read the tokenizer that the command line names, and print it; returns the exit code."""
    path, eos_token_ids = Path(sys.argv[1]), json.loads(sys.argv[2])
    try:
        read = _read(path, eos_token_ids)
    except TokenizerError as error:
        print(json.dumps({"problem": str(error)}))  # noqa: T201 - its only output
        return 0
    answer = {
        "tokenizer": read.tokenizer.to_str(),
        "encode_special_tokens": read.tokenizer.encode_special_tokens,
        "bos_token": read.bos_token,
        "eos_token_ids": sorted(read.eos_token_ids),
    }
    print(json.dumps(answer))  # noqa: T201 - its only output
    return 0


if __name__ == "__main__":
    sys.exit(main())
