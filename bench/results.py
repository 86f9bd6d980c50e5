"""What was measured, as it is written to disk."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")

Case = int | str
"""The x axis of a measure: streams, tokens of a prompt, entries, or a name."""


@dataclass(frozen=True, slots=True)
class Key:
    """What a series of values is about.

    Attributes:
        measure: The measure's name.
        model: The model's name.
        contender: The contender's name.
        metric: What was measured, its unit last: ``rate``, ``ttft_seconds``, ``rss_bytes``.
        case: Where on the x axis.
    """

    measure: str
    model: str
    contender: str
    metric: str
    case: Case


@dataclass
class Results:
    """All figures of one run.

    Attributes:
        about: The machine, versions and the time.
        series: The values of each key, a value a round or a call.
        failures: What did not work: contender, measure, why.
        timelines: Of the running stream while a long prompt arrives, for each contender:
            seconds since the arrival, a message each.
    """

    about: dict[str, Any] = field(default_factory=dict)
    series: dict[Key, list[float]] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    timelines: dict[str, list[float]] = field(default_factory=dict)

    def add(self, key: Key, value: float) -> None:
        """Adds a value to a series."""
        self.series.setdefault(key, []).append(value)

    def fail(self, contender: str, measure: str, why: str) -> None:
        """Notes what did not work."""
        self.failures.append({"contender": contender, "measure": measure, "why": why})

    def values(
        self, measure: str, model: str, contender: str, metric: str, case: Case
    ) -> list[float]:
        """The values of a series; empty if it was not measured."""
        return self.series.get(Key(measure, model, contender, metric, case), [])

    def cases(self, measure: str, model: str, metric: str) -> list[Case]:
        """The x axis of a metric, in the order it was measured."""
        return _unique(
            key.case
            for key in self.series
            if (key.measure, key.model, key.metric) == (measure, model, metric)
        )

    def models(self, measure: str) -> list[str]:
        """The models a measure was made with, in order."""
        return _unique(key.model for key in self.series if key.measure == measure)

    def contenders(self, measure: str, model: str) -> list[str]:
        """Who took part, in order."""
        wanted = (measure, model)
        return _unique(key.contender for key in self.series if (key.measure, key.model) == wanted)

    def write(self, path: Path) -> None:
        """Writes everything as JSON, a series a line."""
        series = [
            json.dumps(asdict(key) | {"values": [float(f"{value:.6g}") for value in values]})
            for key, values in self.series.items()
        ]
        rest = {"about": self.about, "failures": self.failures, "timelines": self.timelines}
        text = ",\n".join(
            [f'"{name}": {json.dumps(value)}' for name, value in rest.items()]
            + ['"series": [\n' + ",\n".join(series) + "\n]"]
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{\n" + text + "\n}\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Reads what ``write`` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        series: dict[Key, list[float]] = {}
        for row in data["series"]:
            values = row.pop("values")
            series[Key(**row)] = values
        return cls(data["about"], series, data["failures"], data["timelines"])


def _unique(items: Iterable[_T]) -> list[_T]:
    return list(dict.fromkeys(items))
