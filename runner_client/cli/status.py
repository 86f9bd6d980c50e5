"""``mlx-runner status``: state, work and memory of a runner."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from runner_client.cli.shared.access import (
    Credentials,
    access_options,
    address_argument,
    open_client,
)
from runner_client.cli.shared.errors import EXIT_CODES
from runner_client.cli.shared.options import json_option
from runner_client.cli.shared.output import Row, draft_model_rows, print_json, print_rows
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from typing import Unpack

    from runner_client.types import Capabilities, MemoryUsage, Model, Rank, Status


@click.command("status", short_help="Show state, work and memory of a runner.", epilog=EXIT_CODES)
@address_argument
@access_options
@json_option
@click.option(
    "--watch", is_flag=True, help="Print a line now and after each change, until interrupted."
)
def command(
    address: str, *, as_json: bool, watch: bool, **credentials: Unpack[Credentials]
) -> None:
    """Show state, work and memory of the runner at ADDRESS.

    ADDRESS is HOST:PORT, [IPV6]:PORT or unix:/path.
    """
    with open_client(address, **credentials) as client:
        if watch:
            for status in client.watch_status():
                _print_line(status, as_json=as_json)
            return
        status = client.status()
    if as_json:
        print_json(status)
    else:
        print_rows(status_rows(status))


def _print_line(status: Status, *, as_json: bool) -> None:
    if as_json:
        print_json(status)
    else:
        click.echo(status_line(status))


def status_line(status: Status) -> str:
    """Describe the state and work of a runner in one line, with the time of this machine."""
    model = f", {status.model.name}" if status.model else ""
    error = f", last error: {status.last_error}" if status.last_error else ""
    work = f"{status.running_count} running, {status.queued_count} queued"
    memory = format_bytes(status.memory_bytes)
    return f"{time.strftime('%H:%M:%S')}  {_state(status)}{model}, {work}, {memory}{error}"


def status_rows(status: Status) -> list[Row]:
    """Return the rows describing a status."""
    rows = [("state", _state(status))]
    if status.model is not None:
        rows += [("model", _model(status.model)), ("context", _context(status))]
        rows += draft_model_rows(status.model)
        rows += [("requests", text) for text in _requests(status.model.capabilities)]
    rows.append(("work", _work(status)))
    if status.kv_token_capacity:
        held = f"{status.kv_token_count:,} of {status.kv_token_capacity:,} tokens"
        rows += [("KV cache", held), ("last minute", _last_minute(status))]
    rows += [
        ("memory", memory_text(status.memory_usage)),
        ("device", status.device or "unknown until MLX is imported"),
        *([("BLAS", status.blas)] if status.blas else []),
        ("runner", _runner(status)),
        *((f"rank {rank.rank}", _rank(rank)) for rank in status.ranks),
    ]
    if status.last_error:
        rows.append(("last error", status.last_error))
    return rows


def memory_text(memory: MemoryUsage) -> str:
    """Describe the memory of a runner, part by part."""
    has_model = bool(memory.limit_bytes)
    prefix_cache = f" (prefix cache {_prefix_cache(memory)})" if has_model else ""
    outside = f" (outside MLX {format_bytes(memory.other_bytes)})"
    parts = [
        f"active {format_bytes(memory.active_bytes)}{prefix_cache}",
        f"cache {format_bytes(memory.cache_bytes)}",
        f"peak {format_bytes(memory.peak_bytes)}",
        *([f"limit {format_bytes(memory.limit_bytes)}"] if has_model else []),
        f"process {format_bytes(memory.process_bytes)}{outside}",
        *([f"reserved {format_bytes(memory.reserved_bytes)}"] if memory.reserved_bytes else []),
    ]
    return ", ".join(parts)


def _prefix_cache(memory: MemoryUsage) -> str:
    limit = format_bytes(memory.prefix_cache_limit_bytes)
    return f"{format_bytes(memory.prefix_cache_bytes)} of {limit}"


def _state(status: Status) -> str:
    return f"{status.state}, {status.progress} %" if status.state == "loading" else status.state


def _model(model: Model) -> str:
    bits = f"{model.quantization_bits}-bit" if model.quantization_bits else ""
    kv = f"{model.kv_bits}-bit KV cache" if model.kv_bits else ""
    parts = (model.architecture, bits, model.dtype, format_bytes(model.weight_bytes), kv)
    return f"{model.name} ({', '.join(part for part in parts if part)})"


def _context(status: Status) -> str:
    return f"{status.context_length:,} tokens, {status.parallel} completions together"


def _requests(accepted: Capabilities) -> list[str]:
    """Return one description of what requests are accepted; none if nothing is known."""
    counts = [
        (accepted.max_logprobs, "log probabilities"),
        (accepted.max_stop_count, "stop strings"),
        (accepted.max_logit_bias_count, "logit biases"),
    ]
    parts = [
        {True: "decoded together", False: "one after another", None: ""}[accepted.batched],
        {True: "with prefix cache", False: "without prefix cache", None: ""}[accepted.prefix_cache],
        "with constraints" if accepted.constraint_kinds else "",
        *(f"up to {count:,} {name}" for count, name in counts if count is not None),
    ]
    return [", ".join(filter(None, parts))] if any(parts) else []


def _work(status: Status) -> str:
    work = (
        f"{status.running_count} running, {status.queued_count} queued, "
        f"{status.step_count:,} steps since the start"
    )
    age = status.last_progress_age_seconds
    return work if age is None else f"{work}; last progress {age:.1f} s ago"


def _last_minute(status: Status) -> str:
    share = f"{100 * status.prefix_cached_ratio:.0f} % of prompt tokens from the prefix cache"
    return f"{status.tokens_per_second:,.1f} tokens/s, {share}"


def _runner(status: Status) -> str:
    version = f"version {status.server_version}, " if status.server_version else ""
    return f"process {status.pid}, {version}up {status.uptime_seconds:,.0f} s"


def _rank(rank: Rank) -> str:
    device = f" ({rank.device})" if rank.device else ""
    return f"process {rank.pid} on {rank.host}{device}, {memory_text(rank.memory_usage)}"
