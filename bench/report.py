"""Renderer of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import tables
from bench.measures.throughput import GREEDY, PLANS, SAMPLED
from bench.results import Results
from bench.sections import SECTIONS, Section
from bench.targets import evaluate

_INTRODUCTION = """\
# Benchmarks

Written by `make bench` from [its figures]({data}); `make bench-quick` is a five-minute
version. Contenders:

- **direct**: mlx_lm's `BatchGenerator` called in process, nothing served, each row with a
  sampler of its own.
- **ours**: `python -m runner_server` over gRPC.
- **mlx-lm server**: `python -m mlx_lm server`, HTTP.
- **SMG**: the MLX servicer of `smg-grpc-servicer`, gRPC, in an environment of its own (it
  needs mlx-lm < 0.32).

All read the same files, float32 but for the 4-bit model, in processes with the same BLAS
in front of MLX, and get the same prompts from the same load generator, a process of its own
on the same machine. One contender runs at a time; the others wait, stopped (SIGSTOP). They
take turns within each round, after a warm-up that is not counted. Figures are medians of
{rounds} rounds, in brackets the lowest and the highest. Every stream generates exactly the
tokens it is asked for, which is checked, and no two prompts begin alike except where a shared
beginning is what is measured.

Rates are tokens of all streams per second, from the first request sent to the last token
received, prompts included. mlx-lm server streams text and not tokens: its tokens are what it
reports at the end of each stream, its gaps are between messages. Sampled means temperature
0.8, top_p 0.95, top_k 40. Ours draws with a seed for each request, the peers without:
mlx-lm server would serve seeded requests one at a time, and SMG sets the seed on a thread
that draws nothing.

Nothing here was measured on Metal or CUDA.
"""


def render(results: Results, plots: Sequence[str], folder: str, rounds: int) -> str:
    """Render the report as Markdown.

    Args:
        results: Results of the run.
        plots: File names of the plots.
        folder: Link target of the folder with figures and plots.
        rounds: Number of rounds that were measured.
    """
    parts = [
        _INTRODUCTION.format(data=f"{folder}/results.json", rounds=rounds),
        "## Machine\n\n" + _machine(results.about),
        "## Targets\n\nEach is a figure of this run.\n\n" + tables.verdicts(evaluate(results)),
    ]
    parts.append(_throughput(results, plots, folder))
    parts += [_section(section, results, plots, folder) for section in SECTIONS]
    if results.failures:
        parts.append("## What failed\n\n" + _failures(results))
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _machine(about: dict[str, Any]) -> str:
    """Describe the hardware and the versions that the figures depend on."""
    versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    smg = ", ".join(f"{name} {version}" for name, version in about["smg_packages"].items())
    size = f"{about['cores']} cores, {about['memory_bytes'] / 2**30:.0f} GiB"
    fast, stock = _gflops(about["gemm_gflops"]), _gflops(about["gemm_gflops_stock"])
    lines = [
        f"- {about['cpu']}, {size}, {about['os']}, Python {about['python']}",
        f"- {about['blas']}, {fast} (float32, 512 x 4096 times 4096 x 1024); as installed: {stock}",
        f"- {versions}",
        f"- SMG's environment: {smg}",
        f"- commit {about['commit']}, {about['time']}",
    ]
    return "\n".join(lines)


def _gflops(value: float | None) -> str:
    return f"{tables.figure(value)} GFLOP/s" if value else "not measured"


def _section(section: Section, results: Results, plots: Sequence[str], folder: str) -> str:
    """Render a section: heading, description, tables, and the plot if one was drawn."""
    body = section.tables(results)
    if not body:
        return ""
    parts = [f"## {section.title}", section.text, body]
    parts += [f"![{section.title}]({folder}/{name})" for name in plots if name == section.plot]
    return "\n\n".join(parts)


def _throughput(results: Results, plots: Sequence[str], folder: str) -> str:
    """Render the rates and first-token times of each model, greedy and sampled."""
    parts = ["## Throughput and first token"]
    for model in dict.fromkeys([*results.models(GREEDY), *results.models(SAMPLED)]):
        plan = PLANS[model]
        words = f"Prompts of {plan.prompt_tokens} tokens, {plan.max_tokens} generated."
        parts += [f"### {model}", words]
        for measure in (GREEDY, SAMPLED):
            if results.cases(measure, model, "rate"):
                rates = tables.by_case(results, measure, model, "rate")
                waits = tables.by_case(results, measure, model, "ttft_seconds")
                parts += [f"Tokens per second, {measure}, by streams:", rates]
                parts += [f"Time to first token, {measure}, by streams:", waits]
        name = f"throughput-{model}.png"
        parts += [f"![{model}]({folder}/{name})"] if name in plots else []
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _failures(results: Results) -> str:
    return "\n".join(
        f"- {failure['contender']}, {failure['measure']}: {failure['why']}"
        for failure in results.failures
    )
