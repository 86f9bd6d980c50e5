"""Sections of the report: one for each measure except throughput."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from bench import tables
from bench.contenders import OURS
from bench.contenders.ours import Drafting, OverHttp, RightDraftModel, WrongDraftModel
from bench.measures import (
    arrival,
    constrained,
    drafts,
    growth,
    http,
    limits,
    memory,
    open_loop,
    prefix,
    profile,
    quantized,
    start,
)
from bench.models import DEMO, LONG
from bench.perf import KINDS
from bench.results import Case, Results
from bench.stats import percentile, summarize
from bench.targets import ratio


@dataclass(frozen=True)
class Section:
    """A section of the report.

    Attributes:
        title: Heading.
        text: Description of the measure.
        tables: Renders the figures; returns an empty string if there are none.
        plot: File name of the plot, if any.
    """

    title: str
    text: str
    tables: Callable[[Results], str]
    plot: str = ""


def _agreement(results: Results) -> str:
    rows = []
    for name in results.contenders("agreement", DEMO):
        cells = []
        for metric in ("tokens", "streams"):
            alike, everything = (
                results.values("agreement", DEMO, name, metric, case) for case in ("alike", "all")
            )
            cells.append(f"{alike[0]:,.0f} of {everything[0]:,.0f}")
        rows.append([name, *cells])
    return tables.markdown(["", "tokens before the first difference", "identical streams"], rows)


def _arrival(results: Results) -> str:
    model, long_tokens = arrival.MODEL, arrival.LONG_TOKENS
    gaps = tables.by_case(
        results,
        "arrival",
        model,
        "gap_seconds",
        {"before": "longest gap before", long_tokens: "longest gap during its prefill"},
    )
    waits = tables.by_case(
        results, "arrival", model, "ttft_seconds", {long_tokens: "time to its first token"}
    )
    return f"{gaps}\n\n{waits}"


def _memory(results: Results) -> str:
    one, many = memory.STREAMS
    rows = []
    for name in results.contenders("memory", memory.MODEL):
        sizes = {
            case: results.values("memory", memory.MODEL, name, "rss_bytes", case)
            for case in (0, one, many)
        }
        if not all(sizes.values()):
            continue
        cells = [tables.spread(summarize(values), "rss_bytes") for values in sizes.values()]
        medians = {case: statistics.median(values) for case, values in sizes.items()}
        each = (medians[many] - medians[one]) / (many - one)
        rows.append([name, *cells, tables.mebibytes(each)])
    return tables.markdown(
        ["", "idle", f"{one} stream", f"{many} streams", "per added stream"], rows
    )


def _quantized(results: Results) -> str:
    heads = {"decode_rate": "decode", "prompt_rate": "prefill"}
    rows = []
    for name in results.contenders("quantized", quantized.MODEL):
        series = [results.values("quantized", quantized.MODEL, name, metric, 1) for metric in heads]
        rows.append([name, *(tables.spread(summarize(values), "rate") for values in series)])
    return tables.markdown(["", *heads.values()], rows)


def _prompt_lengths(results: Results) -> str:
    measured = (("prompt-length", growth.MODEL), ("long-prompts", LONG))
    parts = [
        tables.by_case(results, *each, "ttft_seconds")
        for each in measured
        if results.models(each[0])
    ]
    return "\n\n".join(parts)


def _cache_entries(results: Results) -> str:
    parts = []
    for metric, words in (
        ("unrelated_ttft_seconds", "An unrelated prompt, by number of earlier prompts:"),
        ("hit_ttft_seconds", "A prompt with a cached prefix, by number of earlier prompts:"),
    ):
        parts += [words, tables.by_case(results, "cache-entries", growth.MODEL, metric)]
    return "\n\n".join(parts)


def _limits(results: Results) -> str:
    rows = []
    heads = {
        **{("decode_rate", streams): f"decode, {streams}" for streams in limits.STREAMS},
        ("prompt_rate", limits.PROMPT_TOKENS): "prefill",
    }
    for model in results.models(limits.MEASURE):
        cells = []
        for metric, case in heads:
            ours, machine = (
                results.values(limits.MEASURE, model, name, metric, case)
                for name in (OURS, limits.MACHINE)
            )
            reading = ratio(ours, machine)
            if reading is None:
                cells.append("-")
                continue
            limit = tables.figure(statistics.median(machine))
            cells.append(f"{tables.figure(reading.value)} of {limit}")
        rows.append([model, *cells])
    return tables.markdown(["", *heads.values()], rows)


def _profile(results: Results) -> str:
    rows = []
    for model in results.models(profile.MEASURE):
        for case in dict.fromkeys(
            each for kind in KINDS for each in results.cases(profile.MEASURE, model, kind)
        ):
            values = [results.values(profile.MEASURE, model, OURS, kind, case) for kind in KINDS]
            cpus = [statistics.median(each) if each else 0.0 for each in values]
            shares = [f"{each / sum(cpus):.0%}" for each in cpus] if sum(cpus) else []
            rows.append([f"{model}: {case}", tables.figure(sum(cpus)), *shares])
    return tables.markdown(["", "CPUs busy", *KINDS], rows)


def _constrained(results: Results) -> str:
    heads = {
        "rate": "tokens per second",
        "ttft_seconds": "first token",
        "gap_seconds": "p99 of the gaps",
    }
    rows = []
    for model in results.models("constrained"):
        for case in results.cases("constrained", model, "rate"):
            cells = [
                tables.spread(
                    summarize(results.values("constrained", model, OURS, metric, case)), metric
                )
                for metric in heads
            ]
            rows.append([f"{model}: {case}", *cells])
    return tables.markdown(["", *heads.values()], rows)


def _drafts(results: Results) -> str:
    rows = []
    for model in results.models(drafts.MEASURE):
        for case in results.cases(drafts.MEASURE, model, "rate"):
            plain, drafted = (
                results.values(drafts.MEASURE, model, name, "rate", case)
                for name in (OURS, Drafting.name)
            )
            reading = ratio(drafted, plain)
            cells = [tables.spread(summarize(each), "rate") for each in (plain, drafted)]
            shown = "-" if reading is None else tables.figure(reading.value)
            rows.append([f"{model}: {case}", *cells, shown])
    return tables.markdown(["", "without", "with drafts", "ratio"], rows)


def _open_loop(results: Results) -> str:
    percents = (50, 95, 99)
    heads = {"ttft_seconds": "first token", "token_seconds": "per token"}
    rows = []
    for name in results.contenders(open_loop.MEASURE, open_loop.MODEL):

        def values(metric: str, case: Case, name: str = name) -> list[float]:
            return results.values(open_loop.MEASURE, open_loop.MODEL, name, metric, case)

        for case in (*open_loop.SHARES, open_loop.EQUAL):
            rates = values("arrival_rate", case)
            cells = [
                tables.duration(percentile(measured, percent))
                for metric in heads
                if (measured := values(metric, case))
                for percent in percents
            ]
            if cells:
                label = "equal rate" if case == open_loop.EQUAL else f"{case} %"
                rate = tables.figure(statistics.median(rates))
                rows.append([f"{name}, {label}", rate, *cells])
    titles = [f"{what}, p{percent}" for what in heads.values() for percent in percents]
    return tables.markdown(["", "requests/s", *titles], rows)


def _http(results: Results) -> str:
    rows = []
    for model in results.models(http.MEASURE):
        for streams in results.cases(http.MEASURE, model, "rate"):
            over_grpc, over_http = (
                results.values(http.MEASURE, model, name, "rate", streams)
                for name in (OURS, OverHttp.name)
            )
            reading = ratio(over_http, over_grpc)
            cells = [tables.spread(summarize(each), "rate") for each in (over_grpc, over_http)]
            shown = "-" if reading is None else tables.figure(reading.value)
            rows.append([f"{model}, {streams}", *cells, shown])
    return tables.markdown(["model, streams", "gRPC", "HTTP", "ratio"], rows)


def _draft_models(results: Results) -> str:
    measure, names = drafts.DRAFT_MODEL_MEASURE, (RightDraftModel.name, WrongDraftModel.name)
    rows = []
    for model in results.models(measure):
        for case in results.cases(measure, model, "rate"):
            lookup, *others = (
                results.values(measure, model, name, "rate", case)
                for name in (Drafting.name, *names)
            )
            cells = [tables.spread(summarize(each), "rate") for each in (lookup, *others)]
            readings = [ratio(each, lookup) for each in others]
            cells += ["-" if each is None else tables.figure(each.value) for each in readings]
            rows.append([f"{model}: {case}", *cells])
    heads = ["without", "right guesses", "wrong guesses", "ratio, right", "ratio, wrong"]
    return tables.markdown(["", *heads], rows)


def _if_measured(measure: str, render: Callable[[Results], str]) -> Callable[[Results], str]:
    return lambda results: render(results) if results.models(measure) else ""


SECTIONS = (
    Section(
        "Same output",
        f"{DEMO}, greedy: eight concurrent streams complete Python source, and the token ids are "
        "compared with those of the first contender. The contenders batch differently, so a "
        "near-tie may resolve differently.",
        _if_measured("agreement", _agreement),
    ),
    Section(
        "Distance to the machine",
        "Share of the machine's limit that ours reaches over gRPC, and that limit in tokens per "
        "second, measured in turn. Decode with one stream: bytes of weights and KV cache divided "
        "by the rate at which all cores copy as many bytes. More streams: that time or that of the "
        "products with all weight matrices, whichever is longer. Prefill of "
        f"{limits.PROMPT_TOKENS} tokens: the time of the products. Attention, norms and sampling "
        "are not part of the limits. Models that fit into the processor's caches are bound by the "
        "fixed cost of a step instead.",
        _if_measured(limits.MEASURE, _limits),
        "limits.svg",
    ),
    Section(
        "Where the time goes",
        "CPU time of the runner by what the code does, sampled by `perf`, with greedy streams and "
        "with prompts of 512 tokens. OpenBLAS copies the matrices of every product into the order "
        "in which its kernels read, and its threads wait actively for each other.",
        _if_measured(profile.MEASURE, _profile),
    ),
    Section(
        "Shared prefix",
        f"{prefix.MODEL}: time to first token of a prompt of {prefix.PROMPT_TOKENS:,} tokens, when "
        f"new, and when all but the last {prefix.FRESH_TOKENS} tokens have been seen before.",
        _if_measured(
            "prefix",
            lambda results: tables.by_case(results, "prefix", prefix.MODEL, "ttft_seconds"),
        ),
        "prefix.svg",
    ),
    Section(
        "A long prompt arrives",
        f"{arrival.MODEL}: a prompt of {arrival.LONG_TOKENS:,} tokens arrives while one stream "
        "is running.",
        _if_measured("arrival", _arrival),
        "arrival.svg",
    ),
    Section(
        "Health during prefill",
        "The same load, with every health call of the server made every 10 ms.",
        _if_measured("health", lambda results: tables.latencies(results, arrival.MODEL)),
    ),
    Section(
        "Start to first token",
        f"{start.MODEL}: from starting the process to the first token of a prompt of 8 tokens.",
        _if_measured(
            "start",
            lambda results: tables.by_case(
                results, "start", start.MODEL, "start_seconds", {1: "start to first token"}
            ),
        ),
    ),
    Section(
        "Requests at random",
        f"{open_loop.MODEL}: requests arrive at random (Poisson), at shares of the rate that the "
        f"contender reaches with {open_loop.CAPACITY_REQUESTS} requests at once. Each has "
        f"{open_loop.PROMPT_TOKENS} prompt tokens, of which {open_loop.PREFIX_TOKENS} are one of "
        f"{open_loop.PREFIXES} prefixes that return, and generates {open_loop.MAX_TOKENS} tokens. "
        f"The equal rate is {open_loop.EQUAL_SHARE} % of the lowest capacity, for every contender. "
        "The time per token is that of a whole stream after the first token, divided by its "
        "tokens.",
        _if_measured(open_loop.MEASURE, _open_loop),
    ),
    Section(
        "Memory",
        f"{memory.MODEL}: peak resident set of a fresh process, with streams of 900 prompt tokens "
        "and 100 generated tokens.",
        _if_measured("memory", _memory),
    ),
    Section(
        "4-bit model on CPU",
        f"{quantized.MODEL}: tokens per second of one stream, with 64 prompt tokens and 12 "
        "generated tokens. All run as installed, which for the peers means without a fast BLAS.",
        _if_measured("quantized", _quantized),
    ),
    Section(
        "HTTP beside gRPC",
        "Tokens per second of greedy streams through OpenAI's HTTP interface (`--http`), as "
        "events, and over gRPC, in turn. Each request over HTTP opens a connection.",
        _if_measured(http.MEASURE, _http),
    ),
    Section(
        "Constrained against free",
        f"{constrained.STREAMS} streams of {constrained.MAX_TOKENS} tokens, with and without a "
        "JSON schema, in turn on the same server. The grammar is cached after the warm-up. The "
        "peer vllm-mlx is not measured: on a CPU, 0.6.0 answers a chat with a JSON schema with "
        "status 500, because llguidance 1.9.1 masks MLX arrays in a Metal kernel (`[metal_kernel] "
        "No Metal back-end.`), and with that kernel replaced it answers a value cut at the token "
        "limit with status 422; 0.4.1, which masks with lm-format-enforcer 0.11.3 instead, streams "
        "integers above `maximum` and strings longer than `maxLength`.",
        _if_measured("constrained", _constrained),
    ),
    Section(
        "Drafts",
        f"Tokens per second of {drafts.MAX_TOKENS} tokens a stream over gRPC, with and without "
        "[drafts](drafts.md), in turn. Greedy texts of models with random weights repeat one "
        "token, so every draft is right; those of the demo model, which continues Python source, "
        "repeat in part; sampled texts hardly do. Rows of a batch are not drafted. All other "
        "sections are without drafts.",
        _if_measured(drafts.MEASURE, _drafts),
    ),
    Section(
        "Draft models",
        f"Tokens per second of {drafts.MAX_TOKENS} tokens a stream over gRPC, with prompt lookup "
        "alone and with [draft models](drafts.md#a-draft-model), in turn. The model is the demo "
        "model with zeros around its weights, so that the demo model guesses all of its likeliest "
        "tokens. A model of the same shape with random weights guesses none.",
        _if_measured(drafts.DRAFT_MODEL_MEASURE, _draft_models),
    ),
    Section(
        "Growth with the prompt",
        f"{growth.MODEL}: time to first token of a single prompt, by number of tokens. The longest "
        "prompts were measured once, without the peers' servers.",
        _if_measured(
            "prompt-length",
            _prompt_lengths,
        ),
        "prompt-length.svg",
    ),
    Section(
        "Growth with the prefix cache",
        f"{growth.MODEL}: time to first token after a number of other prompts of 64 tokens. The "
        f"unrelated prompt has 256 tokens, the other one {prefix.PROMPT_TOKENS:,}.",
        _if_measured("cache-entries", _cache_entries),
        "cache-entries.svg",
    ),
)
