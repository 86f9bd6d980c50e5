"""Compare this runner with mlx_lm on every model type: ``python -m tools.models``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from runner_server.mlx_backend import MlxBackend
from tools.memory.catalog import CONFIGS
from tools.models.check import Checker, Verdict
from tools.models.table import document, row

QUICK = ("llama", "gemma2", "gemma3_text", "mamba2", "qwen3_moe", "deepseek_v3", "llama4")
"""One type of each kind: plain, alone, windows, recurrent, experts, latent attention, chunks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check the types, print a line for each, and return 1 if any is wrong."""
    args = _parser().parse_args(argv)
    names = {"all": tuple(CONFIGS), "quick": QUICK}.get(args.types[0], tuple(args.types))
    if unknown := set(names) - set(CONFIGS):
        sys.exit(
            f"unknown types: {', '.join(sorted(unknown))}; the catalog has {', '.join(CONFIGS)}"
        )
    backend = MlxBackend()
    backend.open()
    checker, verdicts = Checker(backend, quick=args.types[0] == "quick"), list[Verdict]()
    for name in names:
        verdicts.append(checker.check(name))
        print(row(verdicts[-1]), flush=True)
    backend.close()
    if args.write:
        document(args.write, verdicts)
    wrong = [verdict.model_type for verdict in verdicts if not verdict.is_right]
    print(f"{len(verdicts)} types, {len(wrong)} wrong", *wrong)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.models", description=__doc__)
    parser.add_argument("types", nargs="*", default=["all"], help="all, quick, or type names")
    parser.add_argument("--write", type=Path, help="page whose table to replace")
    return parser


if __name__ == "__main__":
    sys.exit(main())
