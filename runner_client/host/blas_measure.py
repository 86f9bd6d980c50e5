"""Measurement of every BLAS available to a runner on this Linux CPU, each in a new process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from runner_client.host.blas import CORETYPE, in_front, variants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from runner_client.host.blas import Blas
    from runner_client.host.probe import ProbeResult

_AS_FAST = 0.9
"""Fraction of the fastest speed that counts as equal: the best of two measurements may still vary
by this much."""

_CLOSE = 0.5
"""Fraction of the fastest speed worth a second measurement: other load on the machine can cost
this much."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Speed of MLX with one BLAS preloaded.

    Attributes:
        name: The name to display.
        blas: The library; None for MLX's own.
        environment: The environment of the measurement.
        result: The result of the probe in that environment.
    """

    name: str
    blas: Blas | None
    environment: Mapping[str, str]
    result: ProbeResult

    @property
    def gflops(self) -> float:
        """Speed of a float32 matrix product, in 10^9 operations a second; 0 if not measured."""
        return float(self.result.facts.get("gemm_gflops") or 0.0)


def measure(
    libraries: Sequence[Blas],
    environment: Mapping[str, str],
    probe: Callable[[Mapping[str, str]], ProbeResult],
    progress: Callable[[str], None] = lambda _step: None,
) -> tuple[Measurement, ...]:
    """Measure MLX with each library preloaded, with and without variables, and with none.

    Libraries and variables set by the user stay in place; settings that become identical are
    measured once. Settings close to the fastest are measured twice, and the better result counts,
    so that other load on the machine does not decide. Each measurement takes one to five seconds.

    Args:
        libraries: The libraries found.
        environment: The environment of a runner without any of the libraries.
        probe: Queries MLX in a child process with a given environment.
        progress: Called with a description of each measurement before it.

    Returns:
        The chosen measurement, then the others by speed. The choice is the first of ``libraries``
        that is as fast as the fastest, within the variation between two measurements.
    """
    settings = tuple(_settings(libraries, environment))
    measured = []
    for number, (blas, setting) in enumerate(settings, 1):
        name = _name(blas, setting)
        progress(f"measuring {name} ({number} of {len(settings)})")
        measured.append(Measurement(name, blas, setting, probe(setting)))
    if len(measured) > 1:
        close = _CLOSE * max(one.gflops for one in measured)
        for index, one in enumerate(measured):
            if one.gflops > close:
                progress(f"measuring {one.name} again")
                measured[index] = _better_of_two(one, probe)
    chosen = _chosen(measured)
    others = sorted(measured, key=lambda one: one.gflops, reverse=True)
    return (chosen, *(one for one in others if one is not chosen))


def _settings(
    libraries: Sequence[Blas], environment: Mapping[str, str]
) -> Iterable[tuple[Blas | None, dict[str, str]]]:
    """Return each library, and None for MLX's own, with the environment; no environment twice."""
    settings: dict[frozenset[tuple[str, str]], tuple[Blas | None, dict[str, str]]] = {}
    for blas in (*variants(libraries), None):
        setting = in_front(environment, blas) if blas else dict(environment)
        settings.setdefault(frozenset(setting.items()), (blas, setting))
    return settings.values()


def _better_of_two(
    one: Measurement, probe: Callable[[Mapping[str, str]], ProbeResult]
) -> Measurement:
    again = replace(one, result=probe(one.environment))
    return max(one, again, key=lambda one: one.gflops)


def _chosen(measured: Sequence[Measurement]) -> Measurement:
    works = [one for one in measured if not one.result.failure] or measured
    enough = _AS_FAST * max(one.gflops for one in works)
    return next(one for one in works if one.gflops >= enough)


def _name(blas: Blas | None, setting: Mapping[str, str]) -> str:
    if blas is None:
        return "MLX's own"
    core = setting.get(CORETYPE) if blas.name == "OpenBLAS" else None
    return f"{blas.name}, {core} kernels" if core else blas.name


def table(measured: Sequence[Measurement]) -> list[str]:
    """Return a line for each measurement: name, speed, and path or failure."""
    width = max(len(one.name) for one in measured)
    return [f"{one.name:<{width}}  {_figure(one)}  {_remark(one)}".rstrip() for one in measured]


def _figure(one: Measurement) -> str:
    return f"{one.gflops:7.1f} GFLOP/s" if one.gflops else f"{'not measured':>15}"


def _remark(one: Measurement) -> str:
    if one.result.failure:
        return one.result.failure.splitlines()[0]
    return str(one.blas.path) if one.blas else ""
