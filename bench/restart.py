"""Time to the first token of a long prompt after a restart, with and without prefixes on disk.

``python -m bench.restart`` evaluates a prompt once, then starts runners in turn with and without
the directory, and prints a table. It is not part of ``make bench``, because an evaluation takes
minutes.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from bench.models import LONG, SMALL_VOCABULARY, ensure_model
from runner_client import Options, RunnerProcess
from runner_common.contract import PREFIX_CACHE_DIR_VARIABLE
from runner_common.units import format_bytes

_OPTIONS = Options(num_predict=2, temperature=0)


def first_token(model: Path, prompt: list[int], directory: Path | None) -> tuple[float, int]:
    """Start a runner; return the seconds to the first token, and the number of cached tokens.

    Args:
        model: The model's directory.
        prompt: The prompt.
        directory: The directory of prefixes; None for a runner without prefixes on disk.
    """
    env = {PREFIX_CACHE_DIR_VARIABLE: str(directory)} if directory else {}
    context = len(prompt) + 256
    with RunnerProcess(str(model), context_length=context, parallel=1, env=env) as runner:
        began = time.perf_counter()
        seconds = None
        with runner.completion(prompt, options=_OPTIONS) as stream:
            for chunk in stream:
                if chunk.token_ids and seconds is None:
                    seconds = time.perf_counter() - began
                cached = chunk.prompt_cached_count
    if seconds is None:
        raise RuntimeError("the completion had no token")
    return seconds, cached


def _show(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.restart", description=__doc__)
    parser.add_argument("--tokens", type=int, default=26_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = ensure_model(LONG)
    draw = random.Random(0)  # noqa: S311 - test data
    prompt = draw.choices(range(SMALL_VOCABULARY), k=arguments.tokens)
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent) / "prefixes"
        seconds, _ = first_token(model, prompt, directory)
        size = sum(file.stat().st_size for file in directory.iterdir())
        _show(f"evaluated and written in {seconds:.1f} s: {format_bytes(size)}\n")
        _show("| from disk s | cached | evaluated s | ratio |\n|---|---|---|---|")
        for _ in range(arguments.rounds):
            fast, cached = first_token(model, prompt, directory)
            slow, _ = first_token(model, prompt, None)
            _show(f"| {fast:.2f} | {cached:,} | {slow:.1f} | {slow / fast:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
