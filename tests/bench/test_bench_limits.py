"""Limits of the machine, and the share of them that a runner reaches."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tokenizers", reason="no tokenizers (the server extra)")

from bench.contenders.base import Setup
from bench.contenders.machine import Machine, MachineRates
from bench.measures.limits import PROMPT_TOKENS, decode_rate, limits_of
from bench.records import ContenderError, Record
from bench.report import render
from bench.results import Key, Results
from support.bench_results import ABOUT


def test_one_stream_is_bound_by_memory_and_many_by_the_slower_of_both() -> None:
    # A step reads 100 bytes of weights and 1 for each stream, at 1,000 bytes per second.
    rates = MachineRates(1000.0, 1, (5.0, 0.1, 0.8, 2.0))
    assert limits_of(100, rates, (1, 16, 32)) == {
        ("decode_rate", 1): pytest.approx(1 / 0.101),
        ("decode_rate", 16): pytest.approx(16 / 0.116),
        ("decode_rate", 32): pytest.approx(32 / 0.8),
        ("prompt_rate", PROMPT_TOKENS): PROMPT_TOKENS / 2.0,
    }


def test_the_rate_counts_the_time_in_which_all_streams_decode() -> None:
    early = Record(chunks=[(0.0, 1), (1.0, 1), (2.0, 3), (3.0, 1)])
    late = Record(chunks=[(1.0, 1), (2.0, 1), (3.5, 1), (5.0, 1)])
    assert decode_rate([early, late]) == (3 + 1 + 1) / 2.0
    with pytest.raises(ContenderError, match="ended before"):
        decode_rate([early, Record(chunks=[(3.0, 1), (4.0, 1)])])


def test_the_report_tells_share_and_limit() -> None:
    results = Results(about=ABOUT)
    for contender, values in (("machine", [40.0, 50.0, 60.0]), ("ours", [30.0, 40.0, 45.0])):
        results.series[Key("limits", "llama-100m", contender, "decode_rate", 1)] = values
    report = render(results, (), "results", 3)
    assert "| llama-100m | 0.8 of 50 | - | - | - |" in report
    assert "| llama-100m: decode / bandwidth limit, 1 stream | at least 0.8 | 0.8 | met |" in report


@pytest.mark.mlx
@pytest.mark.slow
async def test_the_machine_is_measured_at_the_shapes_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlx_lm", reason="no mlx_lm (the server extra)")
    from support.models import build_model

    monkeypatch.setattr("bench.contenders.base.CACHE", tmp_path)
    path = build_model(tmp_path / "model")
    machine = Machine(Setup(path, 64))
    try:
        await machine.start()
        short, long = [await machine.measure(tokens, [(1, 1), (64, 1)]) for tokens in (8, 16)]
    finally:
        await machine.stop()
    size = (path / "model.safetensors").stat().st_size
    assert 0.9 * size < machine.weight_bytes <= size
    assert 2 * short.kv_bytes == long.kv_bytes > 0
    assert short.copy_rate > 0
    assert all(seconds > 0 for seconds in short.product_seconds)
