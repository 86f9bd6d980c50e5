"""The targets of `make fuzz`, with a hundred generated requests each and without the fuzzer."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, seed, settings

from hostile.fuzz_targets import Parsing, Target, Wire
from support.hostile_requests import Call, calls


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@pytest.mark.parametrize("kind", [Parsing, Wire])
def test_a_target_accepts_any_request(kind: type[Target]) -> None:
    target = kind()

    @seed(1)
    @settings(
        max_examples=100,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(calls(lambda _name: True))
    def send(call: Call) -> None:
        endings.add(target.send(call).removeprefix("ERROR_REASON_"))

    endings: set[str] = set()
    send()
    assert {"OK", "INVALID_FIELD"} <= endings
    assert target.close()
