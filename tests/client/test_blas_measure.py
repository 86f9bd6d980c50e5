"""Which BLAS is chosen of those that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from runner_client.host.blas import Blas
from runner_client.host.blas_measure import measure, table
from runner_client.host.probe import ProbeResult

OPENBLAS = Blas("OpenBLAS", Path("/usr/lib/libopenblas.so.0"), {"OPENBLAS_CORETYPE": "HASWELL"})
PLAIN = Blas("OpenBLAS", OPENBLAS.path)
MKL = Blas("MKL", Path("/venv/lib/libmkl_rt.so.3"))


class Probe:
    """Gives the figures told for what is preloaded and the kernels; the first one first."""

    def __init__(self, figures: Mapping[str, list[float]]) -> None:
        self.figures = {name: list(values) for name, values in figures.items()}
        self.asked: list[str] = []

    def __call__(self, environment: Mapping[str, str]) -> ProbeResult:
        """Measures."""
        library = Path(environment.get("LD_PRELOAD", "stock")).name
        name = " ".join(filter(None, (library, environment.get("OPENBLAS_CORETYPE"))))
        self.asked.append(name)
        gflops = self.figures[name].pop(0)
        if gflops < 0:
            return ProbeResult(failure="the probe ended with exit code -4:\nmore")
        return ProbeResult({"gemm_gflops": gflops or None})


FIGURES = {
    "libopenblas.so.0 HASWELL": [200.0, 201.0],
    "libopenblas.so.0": [120.0, 121.0],
    "libmkl_rt.so.3": [90.0, 90.0],
    "stock": [3.0],
}


def chosen(**changes: list[float]) -> Blas | None:
    """What is chosen, with the figures of one library changed."""
    names = {"haswell": "libopenblas.so.0 HASWELL", "plain": "libopenblas.so.0"}
    names |= {"mkl": "libmkl_rt.so.3", "stock": "stock"}
    figures = {**FIGURES, **{names[key]: values for key, values in changes.items()}}
    return measure((OPENBLAS, MKL), {}, Probe(figures))[0].blas


def test_all_are_measured_and_those_close_to_the_fastest_twice() -> None:
    probe = Probe(FIGURES)
    measured = measure((OPENBLAS, MKL), {"A": "b"}, probe)
    assert [one.blas for one in measured] == [OPENBLAS, PLAIN, MKL, None]
    assert [one.gflops for one in measured] == [201.0, 121.0, 90.0, 3.0]
    once = ["libopenblas.so.0 HASWELL", "libopenblas.so.0", "libmkl_rt.so.3", "stock"]
    assert probe.asked == [*once, *once[:2]]


def test_the_fastest_is_chosen() -> None:
    assert chosen() == OPENBLAS
    assert chosen(plain=[300, 300]) == PLAIN
    assert chosen(mkl=[400, 400]) == MKL
    assert chosen(stock=[1000, 1000]) is None


def test_one_slow_moment_does_not_decide() -> None:
    assert chosen(haswell=[110, 200], plain=[120, 120]) == OPENBLAS
    assert chosen(haswell=[200, 110], plain=[120, 120]) == OPENBLAS


def test_a_close_call_goes_to_the_first() -> None:
    assert chosen(plain=[210, 215]) == OPENBLAS
    assert chosen(plain=[210, 250]) == PLAIN


def test_one_that_kills_the_process_is_not_chosen() -> None:
    assert chosen(haswell=[-1]) == PLAIN
    # Nothing could be measured: the first that works.
    assert chosen(haswell=[-1], plain=[0], mkl=[0], stock=[0]) == PLAIN


def test_figures_that_are_missing_leave_the_order() -> None:
    assert chosen(haswell=[0], plain=[0], mkl=[0], stock=[0]) == OPENBLAS


def test_without_a_library_mlx_is_measured_once() -> None:
    probe = Probe(FIGURES)
    (own,) = measure((), {}, probe)
    assert (own.blas, own.gflops) == (None, 3.0)
    assert probe.asked == ["stock"]


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({"OPENBLAS_CORETYPE": "HASWELL"}, 2),
        ({"LD_PRELOAD": "/opt/libopenblas.so.0"}, 1),
        ({"LD_PRELOAD": "/opt/libmkl_rt.so.3", "OPENBLAS_CORETYPE": "HASWELL"}, 1),
    ],
)
def test_what_the_user_has_set_stands(environment: dict[str, str], count: int) -> None:
    settings: list[Mapping[str, str]] = []

    def probe(setting: Mapping[str, str]) -> ProbeResult:
        settings.append(setting)
        return ProbeResult({"gemm_gflops": 1.0 + len(settings)})

    assert len(measure((OPENBLAS,), environment, probe)) == count
    assert all(setting.items() >= environment.items() for setting in settings)


def test_the_table_has_a_line_for_each() -> None:
    probe = Probe({**FIGURES, "libmkl_rt.so.3": [-1.0]})
    assert table(measure((OPENBLAS, MKL), {}, probe)) == [
        "OpenBLAS, HASWELL kernels    201.0 GFLOP/s  /usr/lib/libopenblas.so.0",
        "OpenBLAS                     121.0 GFLOP/s  /usr/lib/libopenblas.so.0",
        "MLX's own                      3.0 GFLOP/s",
        "MKL                           not measured  the probe ended with exit code -4:",
    ]
