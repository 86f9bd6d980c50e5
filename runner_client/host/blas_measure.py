"""Measures every BLAS that a runner could get on this Linux CPU, each in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from runner_client.host.blas import CORETYPE, in_front, variants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from runner_client.host.blas import Blas
    from runner_client.host.probe import ProbeResult

_AS_FAST = 0.9
"""Of the fastest: the best of two measurements may still differ by that much."""

_CLOSE = 0.5
"""Of the fastest: what other work on the machine can cost a measurement."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What MLX does with one BLAS in front.

    Attributes:
        name: What to call it.
        blas: The library; None for MLX's own.
        environment: What was measured in.
        result: What the probe found in that environment.
    """

    name: str
    blas: Blas | None
    environment: Mapping[str, str]
    result: ProbeResult

    @property
    def gflops(self) -> float:
        """Float32 matrix multiplication, in 10^9 operations a second; 0 if not measured."""
        return float(self.result.facts.get("gemm_gflops") or 0.0)


def measure(
    libraries: Sequence[Blas],
    environment: Mapping[str, str],
    probe: Callable[[Mapping[str, str]], ProbeResult],
) -> tuple[Measurement, ...]:
    """Measures MLX with each library in front, with and without its variables, and alone.

    What the user has preloaded or set stands; settings that come to the same then are
    one. Those that come close to the fastest are measured twice, the better figure
    counts: other work on the machine must not decide. Takes one to five seconds for each.

    Args:
        libraries: Those found.
        environment: Of a runner without any of them.
        probe: Asks MLX in a child process with an environment.

    Returns:
        The one to choose, then the others by speed. Chosen is the fastest, or the first
        of ``libraries`` that is as fast but for what two measurements differ by.
    """
    measured = [
        Measurement(_name(blas, setting), blas, setting, probe(setting))
        for blas, setting in _settings(libraries, environment)
    ]
    if len(measured) > 1:
        close = _CLOSE * max(one.gflops for one in measured)
        measured = [_better_of_two(one, probe) if one.gflops > close else one for one in measured]
    chosen = _chosen(measured)
    others = sorted(measured, key=lambda one: one.gflops, reverse=True)
    return (chosen, *(one for one in others if one is not chosen))


def _settings(
    libraries: Sequence[Blas], environment: Mapping[str, str]
) -> Iterable[tuple[Blas | None, dict[str, str]]]:
    """Each library, and None, with the environment that it makes; no environment twice."""
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
    """A line for each measurement: name, figure, and file or failure."""
    width = max(len(one.name) for one in measured)
    return [f"{one.name:<{width}}  {_figure(one)}  {_remark(one)}".rstrip() for one in measured]


def _figure(one: Measurement) -> str:
    return f"{one.gflops:7.1f} GFLOP/s" if one.gflops else f"{'not measured':>15}"


def _remark(one: Measurement) -> str:
    if one.result.failure:
        return one.result.failure.splitlines()[0]
    return str(one.blas.path) if one.blas else ""
