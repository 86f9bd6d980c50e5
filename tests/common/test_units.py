"""Sizes, as people write them."""

from __future__ import annotations

import pytest

from runner_common.units import parse_bytes


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0", 0),
        ("1000", 1000),
        ("8G", 8 * 2**30),
        ("8GiB", 8 * 2**30),
        ("8gib", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("0.5 MiB", 2**19),
        ("2T", 2**41),
        ("16 B", 16),
        (" 4MiB\n", 2**22),
        (str(2**63 - 1), 2**63 - 1),
    ],
)
def test_sizes_are_parsed(given: str, expected: int) -> None:
    assert parse_bytes(given) == expected


@pytest.mark.parametrize(
    "given", ["", "-1", "1.5", "G", "1 X", "1e9", "nan", "8iB8", "\u00b2", "9" * 5000]
)
def test_other_texts_are_refused(given: str) -> None:
    with pytest.raises(ValueError, match="is not a size; use 8GiB"):
        parse_bytes(given)
