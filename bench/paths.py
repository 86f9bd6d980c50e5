"""Paths of the benchmark."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""Repository root."""

CACHE = ROOT / "bench" / ".cache"
"""Models and logs; not committed."""

RESULTS = ROOT / "bench" / "results"
"""Figures of the last full run; committed."""

SCRATCH = ROOT / "bench" / ".scratch"
"""Figures of the last partial run; not committed."""

REPORT = ROOT / "docs" / "benchmarks.md"

DEMO_MODEL = ROOT / "runner_server" / "demo" / "model"

SMG_PYTHON = ROOT / ".venv-bench-smg" / "bin" / "python"
"""Interpreter of SMG's separate environment; SMG needs an older mlx-lm."""
