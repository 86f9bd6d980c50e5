"""Benchmark results and their JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")

Case = int | str
"""Position on the x axis of a measure: streams, prompt tokens, cache entries, or a name."""


@dataclass(frozen=True, slots=True)
class Key:
    """Key of a series of values.

    Attributes:
        measure: Name of the measure.
        model: Name of the model.
        contender: Name of the contender.
        metric: Name of the metric, ending in the unit: ``rate``, ``ttft_seconds``, ``rss_bytes``.
        case: Position on the x axis.
    """

    measure: str
    model: str
    contender: str
    metric: str
    case: Case


@dataclass
class Results:
    """Figures of one run.

    Attributes:
        about: Machine, versions and time of the run.
        series: Values by key, one per round or call.
        failures: Contender, measure and reason of each failure.
        timelines: Messages of the running stream while a long prompt arrives, by contender, in
            seconds since the arrival.
    """

    about: dict[str, Any] = field(default_factory=dict)
    series: dict[Key, list[float]] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    timelines: dict[str, list[float]] = field(default_factory=dict)

    def add(self, key: Key, value: float) -> None:
        """Append a value to a series."""
        self.series.setdefault(key, []).append(value)

    def fail(self, contender: str, measure: str, why: str) -> None:
        """Record a failure."""
        self.failures.append({"contender": contender, "measure": measure, "why": why})

    def values(
        self, measure: str, model: str, contender: str, metric: str, case: Case
    ) -> list[float]:
        """Return the values of a series, empty if not measured."""
        return self.series.get(Key(measure, model, contender, metric, case), [])

    def cases(self, measure: str, model: str, metric: str) -> list[Case]:
        """Return the x axis values of a metric in the order of measurement."""
        return _unique(
            key.case
            for key in self.series
            if (key.measure, key.model, key.metric) == (measure, model, metric)
        )

    def models(self, measure: str) -> list[str]:
        """Return the models of a measure in order of measurement."""
        return _unique(key.model for key in self.series if key.measure == measure)

    def contenders(self, measure: str, model: str) -> list[str]:
        """Return the contenders with results for a measure and model, in order of measurement."""
        wanted = (measure, model)
        return _unique(key.contender for key in self.series if (key.measure, key.model) == wanted)

    def write(self, path: Path) -> None:
        """Write the results as JSON with one series per line."""
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
        """Read a file written by ``write``."""
        data = json.loads(path.read_text(encoding="utf-8"))
        series: dict[Key, list[float]] = {}
        for row in data["series"]:
            values = row.pop("values")
            series[Key(**row)] = values
        return cls(data["about"], series, data["failures"], data["timelines"])


def _unique(items: Iterable[_T]) -> list[_T]:
    return list(dict.fromkeys(items))
