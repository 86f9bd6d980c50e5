"""What a server is started with, and its command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runner_server.messages import MAX_PARALLEL, Dtype, LoadSpec


@dataclass(frozen=True)
class ServerConfig:
    """What a server is started with.

    Attributes:
        listen: ``HOST:PORT`` (port 0 = any free one) or ``unix:/path``.
        load: A model to load at once; None waits for a ``Load`` call.
        max_queued: Completions that may wait for a place.
        exit_with_parent: End when the parent process does.
        log_level: A level of Python's logging.
    """

    listen: str = "127.0.0.1:0"
    load: LoadSpec | None = None
    max_queued: int = 128
    exit_with_parent: bool = False
    log_level: str = "INFO"


def parse_args(argv: Sequence[str] | None = None) -> ServerConfig:
    """Reads the command line; exits with a usage message if it is wrong."""
    args = _parser().parse_args(argv)
    load = None
    if args.model:
        load = LoadSpec(
            model=args.model,
            context_length=args.context_length,
            parallel=args.parallel,
            dtype=Dtype(args.dtype),
            memory_limit_bytes=args.memory_limit_bytes,
            prefix_cache_bytes=args.prefix_cache_bytes,
        )
    return ServerConfig(
        listen=args.listen,
        load=load,
        max_queued=args.max_queued,
        exit_with_parent=args.exit_with_parent,
        log_level=args.log_level,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="runner_server",
        description="Hosts one MLX language model and serves it over gRPC. Once it listens it "
        "prints one line on stdout: 1|1|tcp|HOST:PORT|grpc or 1|1|unix|PATH|grpc.",
    )
    add = parser.add_argument
    add("--listen", default="127.0.0.1:0", help="HOST:PORT or unix:/path (default %(default)s)")
    add("--model", help="load this directory or cached hub id at once, or exit")
    add("--context-length", type=_at_least(2), help="longest sequence in tokens")
    add(
        "--parallel",
        type=_at_least(1, MAX_PARALLEL),
        default=4,
        help="completions decoded together",
    )
    add("--dtype", choices=[dtype.value for dtype in Dtype], default="auto", help="weight format")
    add(
        "--memory-limit-bytes",
        type=_at_least(1),
        help="most memory for weights and caches",
    )
    add(
        "--prefix-cache-bytes",
        type=_at_least(0),
        help="most memory to keep evaluated prompts in, for others that begin alike; 0 keeps none",
    )
    add("--max-queued", type=_at_least(1), default=128, help="completions that may wait")
    add(
        "--exit-with-parent",
        action="store_true",
        help="end within 2 s of the parent; stdin must be a pipe that only the parent holds open",
    )
    levels = ["DEBUG", "INFO", "WARNING", "ERROR"]
    add("--log-level", choices=levels, default="INFO", help="of the log on stderr")
    return parser


def _at_least(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """Reads a number of a range that the protocol states as well."""

    def number(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not in the range {low} to {high}")
        return value

    return number
