"""Statistics of the soak."""

from __future__ import annotations

import pytest

from soak.records import Sample
from soak.stats import growth, own_slope, rss_slope, slope, warm

MIB = 2**20


def _sample(seconds: float, rss_bytes: int = 0, cache_bytes: int = 0) -> Sample:
    return Sample(seconds, 0.0, 0, 0, rss_bytes, 0, cache_bytes, 0, 0.0, 0, 0)


def test_points_on_a_line_give_the_slope_of_the_line() -> None:
    assert slope([1, 2, 4], [5, 7, 11]) == pytest.approx(2)
    assert slope([0, 1, 2], [3, 3, 3]) == 0


def test_the_slope_minimizes_the_squared_residuals() -> None:
    xs = [float(i * i % 97) for i in range(50)]
    ys = [3 * x + (17 * i % 41 - 20) for i, x in enumerate(xs)]
    best = slope(xs, ys)
    mean_x, mean_y = sum(xs) / 50, sum(ys) / 50

    def squares(candidate: float) -> float:
        return sum(
            (y - mean_y - candidate * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True)
        )

    assert squares(best) < min(squares(best - 1e-4), squares(best + 1e-4))
    assert best == pytest.approx(3, abs=0.5)


@pytest.mark.parametrize(("xs", "ys"), [([], []), ([1], [1]), ([2, 2], [1, 5]), ([1, 2], [1])])
def test_a_slope_needs_two_points(xs: list[float], ys: list[float]) -> None:
    with pytest.raises(ValueError, match="two points"):
        slope(xs, ys)


def test_the_slope_of_the_resident_set_is_in_mebibytes_per_hour() -> None:
    samples = [_sample(second, 100 * MIB + second * MIB) for second in range(10)]
    assert rss_slope(samples) == pytest.approx(3600)


def test_the_own_slope_excludes_the_buffer_cache() -> None:
    samples = [_sample(second, (100 + 3 * second) * MIB, second * MIB) for second in range(10)]
    assert rss_slope(samples) == pytest.approx(3 * 3600)
    assert own_slope(samples) == pytest.approx(2 * 3600)


def test_the_first_quarter_is_the_warm_up() -> None:
    samples = [_sample(second) for second in range(1, 101)]
    assert [warm(samples, 100)[0].seconds, len(warm(samples, 100))] == [25, 76]


@pytest.mark.parametrize(
    ("values", "more"),
    [
        ([5, 5, 5], 0),
        ([5, 9, 5, 5, 5, 5], -2),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], 6),
        # A temporary peak does not count.
        ([5, 5, 5, 50, 50, 50, 5, 5, 60], 0),
    ],
)
def test_growth_compares_the_last_third_with_the_first(values: list[int], more: int) -> None:
    assert growth(values) == more


def test_growth_needs_three_values() -> None:
    with pytest.raises(ValueError, match="three"):
        growth([1, 2])
