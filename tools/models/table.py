"""Table of docs/models.md."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from tools.memory.catalog import LEFT_OUT
from tools.models.check import ALONE, Verdict

_HEAD = """| type | alone | batch | prefix cache | bfloat16 | 4 bits | dequantized | notes |
|---|---|---|---|---|---|---|---|"""

_MARK = "<!-- `make models` writes what follows. -->"


def document(path: Path, verdicts: Sequence[Verdict]) -> None:
    """Replace everything after the marker of a page by summary and table."""
    text, mark, _ = path.read_text().partition(_MARK)
    if not mark:
        raise ValueError(f"{path} has no line {_MARK!r}")
    path.write_text(f"{text}{_MARK}\n\n{_summary(verdicts)}\n\n{table(verdicts)}\n")


def table(verdicts: Sequence[Verdict]) -> str:
    """Return the table, including the types left out of the catalog."""
    rows = [row(verdict) for verdict in verdicts]
    left_out = [f"| {name} | - | - | - | - | - | - | {why} |" for name, why in LEFT_OUT.items()]
    return "\n".join([_HEAD, *sorted([*rows, *left_out], key=str.lower)])


def row(verdict: Verdict) -> str:
    """Return the table row of a type."""
    v = verdict
    cells = (v.alone, v.batch, v.prefix, v.narrow, v.quantized, v.dequantized, _short(v.notes))
    return f"| {v.model_type} | " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _short(notes: str) -> str:
    """Shorten the warning about unbatched rows to the reason; the rest is always the same."""
    return re.sub(r"completions run one after .* together rightly \((.*?)\)(?=;|$)", r"\1", notes)


def _summary(verdicts: Sequence[Verdict]) -> str:
    right = [each for each in verdicts if each.is_right]
    alone = [each.model_type for each in right if each.batch == ALONE]
    wrong = [each.model_type for each in verdicts if not each.is_right]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("mlx", "mlx-lm"))
    made = f"{datetime.now(UTC):%Y-%m-%d}, {versions}, {platform.system()} {platform.machine()}"
    return (
        f"Made on {made}, CPU. {len(verdicts)} types: {len(right) - len(alone)} are right in "
        f"everything with rows together, {len(alone)} with rows alone ({_listed(alone)}); "
        f"{len(wrong)} are not ({_listed(wrong)})."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)) or "none"
