"""Server options and the command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runner_common.contract import MAX_PARALLEL, MAX_PORT, TOKEN_VARIABLE
from runner_server.engine.types import Dtype, LoadSpec
from runner_server.transport.auth import read_token
from runner_server.transport.tls import TlsFiles


@dataclass(frozen=True)
class ServerConfig:
    """Options of a server.

    Attributes:
        listen: ``HOST:PORT`` (port 0 = any free one) or ``unix:/path``.
        load: Model to load at start; None waits for a ``Load`` call.
        max_queued: Most completions that may wait in the queue.
        stall_seconds: Time without progress, with work to do, after which the process exits;
            0 disables the check.
        exit_with_parent: Exit when the parent process does.
        log_level: Level of Python's logging.
        log_format: ``text`` or ``json``.
        metrics_listen: Host and port for Prometheus scrapes; None serves no metrics.
        tls: Certificate and key; None does not encrypt.
        token: Token required of callers; None requires none.
        model_root: Resolved directory that contains every model that may be loaded; None
            allows any directory.
        distributed: Run as one of several processes that hold the model together.
        pipeline: Split the model between layers rather than within each layer.
        smg: Also serve the worker protocol of the SMG gateway.
    """

    listen: str = "127.0.0.1:0"
    load: LoadSpec | None = None
    max_queued: int = 128
    stall_seconds: float = 120.0
    exit_with_parent: bool = False
    log_level: str = "INFO"
    log_format: str = "text"
    metrics_listen: tuple[str, int] | None = None
    tls: TlsFiles | None = None
    token: str | None = field(default=None, repr=False)
    model_root: Path | None = None
    distributed: bool = False
    pipeline: bool = False
    smg: bool = False


def parse_args(argv: Sequence[str] | None = None) -> ServerConfig:
    """Parse the command line; exit with a usage message if invalid."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.pipeline and not args.distributed:
        parser.error("--pipeline needs --distributed")
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
        stall_seconds=args.stall_seconds,
        exit_with_parent=args.exit_with_parent,
        log_level=args.log_level,
        log_format=args.log_format,
        metrics_listen=args.metrics_listen,
        tls=_tls(parser, args),
        token=_token(parser, args),
        model_root=args.model_root,
        distributed=args.distributed,
        pipeline=args.pipeline,
        smg=args.smg,
    )


def _tls(parser: argparse.ArgumentParser, args: argparse.Namespace) -> TlsFiles | None:
    if bool(args.tls_cert) != bool(args.tls_key):
        parser.error("--tls-cert and --tls-key go together")
    if args.tls_cert:
        return TlsFiles(args.tls_cert, args.tls_key, args.tls_client_ca)
    if args.tls_client_ca:
        parser.error("--tls-client-ca needs --tls-cert and --tls-key")
    return None


def _token(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str | None:
    try:
        return read_token(args.token_file)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="runner_server",
        # `--token SECRET` must not abbreviate --token-file and have the secret in an error message.
        allow_abbrev=False,
        description="Hosts one MLX language model and serves it over gRPC. Once listening, it "
        "prints one line on stdout: 1|1|tcp|HOST:PORT|grpc or 1|1|unix|PATH|grpc.",
    )
    add = parser.add_argument
    add("--listen", default="127.0.0.1:0", help="HOST:PORT or unix:/path (default %(default)s)")
    add("--model", help="directory or cached hub id to load at start; exit if that fails")
    add("--context-length", type=_at_least(2), help="longest sequence in tokens")
    add(
        "--parallel",
        type=_at_least(1, MAX_PARALLEL),
        default=4,
        help="most completions decoded together (default %(default)s)",
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
        help="largest size of the prefix cache, which shares prefill among prompts; 0 disables it",
    )
    add(
        "--max-queued",
        type=_at_least(1),
        default=128,
        help="most completions that may be queued (default %(default)s)",
    )
    add(
        "--stall-seconds",
        type=_seconds,
        default=120.0,
        help="exit with code 71 if the engine has work but makes no progress for this long; 0 "
        "disables the check (default %(default)s)",
    )
    add(
        "--exit-with-parent",
        action="store_true",
        help="exit within 2 s of the parent; stdin should be a pipe that only the parent holds",
    )
    _add_cluster_options(parser)
    _add_access_options(parser)
    _add_telemetry_options(parser)
    return parser


def _add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of one server among several: ranks of a model, workers of a gateway."""
    add = parser.add_argument
    add(
        "--distributed",
        action="store_true",
        help="run as one of the processes started by mlx.launch, which hold the model together; "
        "rank 0 serves",
    )
    add(
        "--pipeline",
        action="store_true",
        help="give each process some of the layers, even if every layer could be split",
    )
    add("--smg", action="store_true", help="also serve the worker protocol of the SMG gateway")


def _add_telemetry_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of log and metrics."""
    add = parser.add_argument
    levels = ["DEBUG", "INFO", "WARNING", "ERROR"]
    add("--log-level", choices=levels, default="INFO", help="level of the log on stderr")
    add("--log-format", choices=["text", "json"], default="text", help="format of the log")
    add(
        "--metrics-listen",
        type=_host_and_port,
        metavar="HOST:PORT",
        help="serve Prometheus metrics there, for instance 127.0.0.1:9464 (default: no metrics)",
    )


def _add_access_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "access",
        "Without a token or TLS, the server listens only on loopback addresses and unix sockets.",
    ).add_argument
    add(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with the token that every call must send as `authorization: Bearer TOKEN` "
        f"(default: the environment variable {TOKEN_VARIABLE}; if unset, no token is needed)",
    )
    add("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM; reread on changes")
    add(
        "--tls-key",
        type=Path,
        metavar="FILE",
        help="private key of the certificate, PEM without a password",
    )
    add(
        "--tls-client-ca",
        type=Path,
        metavar="FILE",
        help="accept only clients with a certificate of one of these authorities, PEM",
    )
    add(
        "--model-root",
        type=_directory,
        metavar="DIR",
        help="load only models below this directory, after resolving links",
    )


def _host_and_port(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    if not (separator and host and port.isdecimal() and int(port) <= MAX_PORT):
        raise argparse.ArgumentTypeError(f"{text!r}: expected HOST:PORT, the port 0 to {MAX_PORT}")
    return host.strip("[]"), int(port)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds, 0 or more")
    return value


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    return path.resolve()


def _at_least(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """Return a parser of integers from ``low`` to ``high``, a range stated in the protocol too."""

    def number(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not in the range {low} to {high}")
        return value

    return number
