"""Kinds of work in samples of ``perf``."""

from __future__ import annotations

import pytest

pytest.importorskip("tokenizers", reason="no tokenizers (the server extra)")

from bench.perf import CALLS, ENGINE, MEMORY, MLX, PACKING, PRODUCTS, SYSTEM, WAITING, kinds_of
from bench.report import render
from bench.results import Key, Results
from support.bench_results import ABOUT

MAIN, OTHER = 100, 101


@pytest.mark.parametrize(
    ("thread", "symbol", "file", "kind"),
    [
        (OTHER, "sgemm_kernel_SKYLAKEX", "/usr/lib/libopenblasp-r0.3.21.so", PRODUCTS),
        (OTHER, "sgemm_incopy_SKYLAKEX", "/usr/lib/libopenblasp-r0.3.21.so", PACKING),
        (OTHER, "sgemm_otcopy_SKYLAKEX", "/usr/lib/libopenblasp-r0.3.21.so", PACKING),
        (OTHER, "blas_thread_server", "/usr/lib/libopenblasp-r0.3.21.so", WAITING),
        (OTHER, "do_sched_yield", "[kernel.kallsyms]", WAITING),
        (OTHER, "mlx::core::fast::rope(int, float)", "/site-packages/mlx/lib/libmlx.so", MLX),
        (OTHER, "_PyEval_EvalFrameDefault", "/usr/lib/libpython3.11.so.1.0", ENGINE),
        (MAIN, "_PyEval_EvalFrameDefault", "/usr/lib/libpython3.11.so.1.0", CALLS),
        (OTHER, "grpc_core::Slice", "/grpc/_cython/cygrpc.cpython-311-x86_64.so", CALLS),
        (OTHER, "__fmaf_fma3", "/usr/lib/x86_64-linux-gnu/libm.so.6", MLX),
        (OTHER, "main", "/kernels/AbsV_f4_61425_contiguous.so", MLX),
        (OTHER, "_int_malloc", "/usr/lib/x86_64-linux-gnu/libc.so.6", MEMORY),
        (OTHER, "irqentry_exit_to_user_mode", "[kernel.kallsyms]", SYSTEM),
    ],
)
def test_a_sample_belongs_to_one_kind(thread: int, symbol: str, file: str, kind: str) -> None:
    line = f" {thread}      7f6471efa8f6 {symbol} ({file})"
    assert dict(kinds_of([line, "", "not a sample"], MAIN)) == {kind: 1}


def test_the_report_gives_shares_of_the_time() -> None:
    results = Results(about=ABOUT)
    for kind, cpus in ((PRODUCTS, 1.2), (PACKING, 0.4)):
        results.series[Key("profile", "demo", "ours", kind, "prefill")] = [cpus]
    text = render(results, (), "results", 3)
    assert "| demo: prefill | 1.6 | 75% | 25% | 0% | 0% | 0% | 0% | 0% | 0% |" in text
