"""The choice among measured BLAS libraries."""

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
    """Probe with scripted figures, in order, for each preloaded library and kernel."""

    def __init__(self, figures: Mapping[str, list[float]]) -> None:
        self.figures = {name: list(values) for name, values in figures.items()}
        self.asked: list[str] = []

    def __call__(self, environment: Mapping[str, str]) -> ProbeResult:
        """Record the configuration and return the next figure."""
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
    """Return the chosen BLAS, with the figures of some configurations replaced."""
    names = {"haswell": "libopenblas.so.0 HASWELL", "plain": "libopenblas.so.0"}
    names |= {"mkl": "libmkl_rt.so.3", "stock": "stock"}
    figures = {**FIGURES, **{names[key]: values for key, values in changes.items()}}
    return measure((OPENBLAS, MKL), {}, Probe(figures))[0].blas


def test_every_variant_is_measured_and_the_fastest_ones_twice() -> None:
    probe = Probe(FIGURES)
    measured = measure((OPENBLAS, MKL), {"A": "b"}, probe)
    assert [each.blas for each in measured] == [OPENBLAS, PLAIN, MKL, None]
    assert [each.gflops for each in measured] == [201.0, 121.0, 90.0, 3.0]
    once = ["libopenblas.so.0 HASWELL", "libopenblas.so.0", "libmkl_rt.so.3", "stock"]
    assert probe.asked == [*once, *once[:2]]


def test_the_fastest_is_chosen() -> None:
    assert chosen() == OPENBLAS
    assert chosen(plain=[300, 300]) == PLAIN
    assert chosen(mkl=[400, 400]) == MKL
    assert chosen(stock=[1000, 1000]) is None


def test_one_slow_measurement_does_not_decide() -> None:
    assert chosen(haswell=[110, 200], plain=[120, 120]) == OPENBLAS
    assert chosen(haswell=[200, 110], plain=[120, 120]) == OPENBLAS


def test_a_near_tie_goes_to_the_first() -> None:
    assert chosen(plain=[210, 215]) == OPENBLAS
    assert chosen(plain=[210, 250]) == PLAIN


def test_a_library_that_crashes_the_probe_is_not_chosen() -> None:
    assert chosen(haswell=[-1]) == PLAIN
    # Without any figure, the first variant that does not crash the probe is chosen.
    assert chosen(haswell=[-1], plain=[0], mkl=[0], stock=[0]) == PLAIN


def test_missing_figures_keep_the_order() -> None:
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
def test_variables_set_by_the_user_are_kept(environment: dict[str, str], count: int) -> None:
    settings: list[Mapping[str, str]] = []

    def probe(setting: Mapping[str, str]) -> ProbeResult:
        settings.append(setting)
        return ProbeResult({"gemm_gflops": 1.0 + len(settings)})

    assert len(measure((OPENBLAS,), environment, probe)) == count
    assert all(setting.items() >= environment.items() for setting in settings)


def test_the_table_has_a_line_for_each_variant() -> None:
    probe = Probe({**FIGURES, "libmkl_rt.so.3": [-1.0]})
    assert table(measure((OPENBLAS, MKL), {}, probe)) == [
        "OpenBLAS, HASWELL kernels    201.0 GFLOP/s  /usr/lib/libopenblas.so.0",
        "OpenBLAS                     121.0 GFLOP/s  /usr/lib/libopenblas.so.0",
        "MLX's own                      3.0 GFLOP/s",
        "MKL                           not measured  the probe ended with exit code -4:",
    ]
