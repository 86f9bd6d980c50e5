"""Compare peak memory of runners with the estimate: ``python -m tools.memory``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from runner_client.errors import RunnerError
from tools.memory.measure import Measured, measure
from tools.memory.models import NotWrittenError, scaled, write_model
from tools.memory.rows import Row, all_formats, all_types, quick, shaped

_MIB = 1 << 20

LEAST, MOST = 0.6, 1.0
"""Bounds of peak over estimate; the goal is 0.7 to 1.0."""

_SETS = {"shaped": shaped, "quick": quick, "types": all_types, "formats": all_formats}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and return 1 if a ratio is out of bounds."""
    args = _parser().parse_args(argv)
    rows = [row for row in _SETS[args.set]() if args.only in row.name]
    print(_HEAD, flush=True)
    outside: list[str] = []
    refused: list[str] = []
    for row in rows:
        try:
            measured = _measure(row)
        except (RunnerError, NotWrittenError) as error:
            refused.append(row.name)
            print(f"{_about(row)} refused: {str(error)[:150]}", flush=True)
            continue
        print(_line(row, measured), flush=True)
        if args.json:
            _append(args.json, row, measured)
        if not LEAST <= measured.ratio <= MOST:
            outside.append(f"{row.name} x {row.setting.parallel}: {measured.ratio:.2f}")
    print(f"{len(rows)} rows, {len(refused)} refused, {len(outside)} outside {LEAST} to {MOST}")
    print(*outside, sep="\n")
    return 1 if outside or (refused and args.set in ("quick", "shaped")) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.memory", description=__doc__)
    parser.add_argument("set", nargs="?", choices=_SETS, default="shaped")
    parser.add_argument("--only", default="", help="measure only rows whose name contains this")
    parser.add_argument("--json", type=Path, help="append one line of JSON per row")
    return parser


def _measure(row: Row) -> Measured:
    config = scaled(row.model_type, **row.sizes)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), config, dtype=row.stored_dtype, bits=row.bits)
        return measure(Path(folder), row.setting)


_HEAD = (
    f"{'model':42} {'streams':>7} {'context':>7} {'estimate':>8} {'peak':>6} {'ratio':>5} "
    f"{'MLX':>6} {'limit':>6} {'loaded':>6} {'idle':>5}   MiB"
)


def _about(row: Row) -> str:
    return f"{row.name:42} {row.setting.parallel:7} {row.setting.context_length:7}"


def _line(row: Row, measured: Measured) -> str:
    sizes = (measured.mlx_peak_bytes, measured.limit_bytes, measured.loaded_bytes)
    return (
        f"{_about(row)} {_mib(measured.estimate.total_bytes):>8} {_mib(measured.peak_bytes):>6} "
        f"{measured.ratio:5.2f} {' '.join(f'{_mib(size):>6}' for size in sizes)} "
        f"{_mib(measured.idle_bytes):>5}   {_parts(measured)}"
    )


def _parts(measured: Measured) -> str:
    parts: Iterable[tuple[str, int]] = measured.estimate.parts.items()
    return ", ".join(f"{name} {_mib(size)}" for name, size in parts if size >= _MIB)


def _mib(size: int) -> str:
    return f"{size / _MIB:.0f}"


def _append(path: Path, row: Row, measured: Measured) -> None:
    with path.open("a") as file:
        line = {"row": asdict(row), "ratio": measured.ratio, **asdict(measured)}
        print(json.dumps(line), file=file)


if __name__ == "__main__":
    sys.exit(main())
