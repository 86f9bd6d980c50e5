"""Compare this runner with transformers: ``python -m tools.parity FOLDER PAGE``.

FOLDER is the output of ``contender.py``. PAGE is rewritten with a row for each model: the largest
difference among the twenty most likely log probabilities, or the reason for a refusal. The exit
code is 1 if any model differs without a warning.
"""

from __future__ import annotations

import datetime as dt
import json
import platform
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from runner_client import Options, RunnerClient, RunnerError
from tools.parity.serving import server

TOLERANCE = 2e-3
"""In nats. In float32 the same computation differed by at most 1e-4."""

_TOP = 20
_NOTE_CHARS = 200

_HEAD = """# Models saved by transformers

Tiny models with random weights, saved with `save_pretrained` of transformers and loaded unchanged.
The log probabilities after one prompt of 48 tokens are compared with those of transformers, in
float32 on both sides.

- `same`: the twenty most likely log probabilities differ by less than 0.002 nats.
- `refused`: the load is refused for the reason given, or the prompt is, because it exceeds the
  length up to which the model is exact.
- `warned`: the log probabilities differ, and `Model.warnings` says so.
- `not written`: transformers could not build the model.

A difference without a warning fails `make parity`, which generates this page.

{date}, transformers {transformers}, mlx_lm {mlx_lm}, mlx {mlx}, {machine}, CPU: {summary}.

| model | verdict | nats | |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """Result for one model.

    Attributes:
        name: Name of the case.
        verdict: ``"same"``, ``"refused"``, ``"warned"``, ``"not written"`` or
            ``"DIFFERS"``.
        difference: Largest difference of a log probability, in nats.
        note: Warnings, or the reason for the missing comparison.
    """

    name: str
    verdict: str
    difference: float | None = None
    note: str = ""

    def __str__(self) -> str:
        difference = "" if self.difference is None else f"{self.difference:.1e}"
        note = " ".join(self.note.split())
        note = note if len(note) <= _NOTE_CHARS else f"{note[:_NOTE_CHARS]}..."
        return f"| {self.name} | {self.verdict} | {difference} | {note} |"


def compare(client: RunnerClient, folder: Path) -> Row:
    """Load one model and compare the log probabilities with those of transformers."""
    if (folder / "problem.txt").exists():
        return Row(folder.name, "not written", note=(folder / "problem.txt").read_text())
    expected = json.loads((folder / "expected.json").read_text())
    try:
        model = client.load(str(folder), parallel=1).model
        options = Options(temperature=0, num_predict=1)
        answer = client.complete(expected["prompt"], options=options, logprobs=_TOP)
    except RunnerError as error:
        return Row(folder.name, "refused", note=str(error).replace(f"{folder} ", ""))
    top = answer.logprobs[0].top
    difference = max(abs(each.logprob - expected["logprobs"][each.token_id]) for each in top)
    verdict = "same" if difference < TOLERANCE else "warned" if model.warnings else "DIFFERS"
    return Row(folder.name, verdict, difference, "; ".join(model.warnings))


def main() -> int:
    """Compare every model in the folder, write the page, and return the exit code."""
    root, page = Path(sys.argv[1]), Path(sys.argv[2])
    rows = []
    with server() as client:
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            rows.append(compare(client, folder))
            print(rows[-1], flush=True)  # noqa: T201 - progress
    page.write_text(_page(rows, root), encoding="utf-8")
    return int(any(row.verdict == "DIFFERS" for row in rows))


def _page(rows: list[Row], root: Path) -> str:
    counts = Counter(row.verdict for row in rows)
    releases = {
        json.loads(file.read_text())["transformers"] for file in root.glob("*/expected.json")
    }
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    head = _HEAD.format(
        summary=summary,
        date=dt.datetime.now(tz=dt.UTC).date(),
        transformers=", ".join(sorted(releases)),
        mlx_lm=version("mlx-lm"),
        mlx=version("mlx"),
        machine=f"{platform.system()} {platform.machine()}",
    )
    return head + "\n".join(map(str, rows)) + "\n"


if __name__ == "__main__":
    sys.exit(main())
