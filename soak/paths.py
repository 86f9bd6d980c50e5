"""Paths of the soak test."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""Repository root."""

RESULTS = ROOT / "soak" / "results"
"""Figures of the last full run; committed."""

SCRATCH = ROOT / "soak" / ".scratch"
"""Figures of the last shorter run; not committed."""

MODEL = ROOT / "runner_server" / "demo" / "model"
