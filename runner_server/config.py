"""Configuration of a server, and its command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from runner_common.contract import (
    DEFAULT_PREFIX_CACHE_DISK_BYTES,
    MAX_ADAPTERS,
    MAX_DRAFT,
    PREFIX_CACHE_DIR_VARIABLE,
    PREFIX_CACHE_DISK_VARIABLE,
)
from runner_common.memory.headroom import VariableError, variable_bytes
from runner_common.server_options import SERVER_OPTIONS, ServerOption, misuse
from runner_common.serving.auth import read_tokens
from runner_common.serving.tls import TlsFiles
from runner_server.engine.adapters import AdapterSpec
from runner_server.engine.prefix_disk import PrefixDiskSettings
from runner_server.engine.types import Dtype, LoadSpec

_EXIT_WRONG_USAGE = 2


@dataclass(frozen=True)
class ServerConfig:
    """Configuration of a server.

    Attributes:
        listen: ``HOST:PORT`` (port 0 = any free one) or ``unix:/path``.
        load: Model to load at start; None waits for a ``Load`` call.
        max_queued: Most completions that may wait in the queue.
        draft_tokens: Most tokens to draft for a completion that is alone; 0 drafts none.
        stall_seconds: Time without progress, despite work to do, after which the process exits;
            0 disables the check.
        exit_with_parent: Whether to exit when the parent process does.
        log_level: Level of Python's logging.
        log_format: ``text`` or ``json``.
        http: Host and port of the HTTP interfaces; None serves none.
        metrics_listen: Host and port for Prometheus scrapes; None serves no metrics.
        tls: Certificate and key; None does not encrypt.
        token: Token required of callers; None requires none.
        use_token: Second token, whose holders may only use the loaded model; None if there is none.
        prefix_disk: Prefix cache on disk; None without one.
        model_root: Resolved directory that contains every model that may be loaded; None
            allows any directory.
        distributed: Whether to run as one of several ranks that share the model.
        pipeline: Whether to split the model between layers rather than within each layer.
        smg: Whether to serve the worker protocol of the SMG gateway too.
        vllm: Whether to serve the worker protocol of vLLM behind a gateway too.
    """

    listen: str = "127.0.0.1:0"
    load: LoadSpec | None = None
    max_queued: int = 128
    draft_tokens: int = MAX_DRAFT
    stall_seconds: float = 120.0
    exit_with_parent: bool = False
    log_level: str = "INFO"
    log_format: str = "text"
    http: tuple[str, int] | None = None
    metrics_listen: tuple[str, int] | None = None
    tls: TlsFiles | None = None
    token: str | None = field(default=None, repr=False)
    use_token: str | None = field(default=None, repr=False)
    prefix_disk: PrefixDiskSettings | None = None
    model_root: Path | None = None
    distributed: bool = False
    pipeline: bool = False
    smg: bool = False
    vllm: bool = False


def parse_args(argv: Sequence[str] | None = None) -> ServerConfig:
    """Parse the command line; exit with a usage message if invalid."""
    parser = _parser()
    arguments = vars(parser.parse_args(argv))
    given = {name: value for name, value in arguments.items() if value is not None}
    if problem := misuse(given):
        parser.error(problem)
    values = {option.name: option.default for option in SERVER_OPTIONS} | given
    token, use_token = _tokens(parser, values)
    same = {each.name for each in fields(ServerConfig)} & values.keys()
    return ServerConfig(
        **{name: values[name] for name in same},
        load=_load(parser, values) if values["model"] else None,
        tls=_tls(values) if "tls_cert" in given else None,
        prefix_disk=_prefix_disk(parser, values),
        token=token,
        use_token=use_token,
    )


def _load(parser: argparse.ArgumentParser, values: Mapping[str, Any]) -> LoadSpec:
    adapters = [AdapterSpec(name, path) for name, path in values["adapter"] or ()]
    if len({adapter.name for adapter in adapters}) < len(adapters):
        parser.error("argument --adapter: two adapters have the same name")
    if len(adapters) > MAX_ADAPTERS:
        parser.error(f"argument --adapter: {len(adapters)}; at most {MAX_ADAPTERS}")
    return LoadSpec(
        model=values["model"],
        context_length=values["context_length"],
        parallel=values["parallel"],
        dtype=Dtype(values["dtype"]),
        memory_limit_bytes=values["memory_limit"],
        prefix_cache_bytes=values["prefix_cache"],
        kv_bits=int(values["kv_bits"]),
        adapters=tuple(adapters),
        draft_model=values["draft_model"] or "",
    )


def _prefix_disk(
    parser: argparse.ArgumentParser, values: Mapping[str, Any]
) -> PrefixDiskSettings | None:
    """Return the prefix cache on disk, by the options or else by the environment.

    Exits if the options contradict each other.
    """
    directory = values["prefix_cache_dir"] or os.environ.get(PREFIX_CACHE_DIR_VARIABLE, "").strip()
    budget_bytes = values["prefix_cache_disk"]
    if not directory:
        if budget_bytes is not None:
            parser.error("--prefix-cache-disk needs --prefix-cache-dir")
        return None
    if values["distributed"]:
        parser.error(
            "--prefix-cache-dir cannot be used with --distributed: the ranks would have to keep "
            f"the same prefixes; leave it out, and {PREFIX_CACHE_DIR_VARIABLE} as well"
        )
    try:
        inherited = variable_bytes(os.environ, PREFIX_CACHE_DISK_VARIABLE)
    except VariableError as error:
        parser.error(str(error))
    if inherited == 0:
        advice = f"leave out --prefix-cache-dir and {PREFIX_CACHE_DIR_VARIABLE} to keep nothing"
        parser.error(f"{PREFIX_CACHE_DISK_VARIABLE} is 0; {advice}")
    budget_bytes = budget_bytes or inherited or DEFAULT_PREFIX_CACHE_DISK_BYTES
    return PrefixDiskSettings(Path(directory).absolute(), budget_bytes)


def _tls(values: Mapping[str, Any]) -> TlsFiles:
    return TlsFiles(values["tls_cert"], values["tls_key"], values["tls_client_ca"])


def _tokens(
    parser: argparse.ArgumentParser, values: Mapping[str, Any]
) -> tuple[str | None, str | None]:
    """Return the token with all rights and the one for use; exit if they are unusable."""
    try:
        return read_tokens(values["token_file"], values["use_token_file"])
    except (OSError, ValueError) as error:
        parser.error(str(error))


class _Parser(argparse.ArgumentParser):
    """Parser whose errors are two lines: what is wrong, and where the options are described.

    ``mlx-runner serve`` becomes this process, so its users see these messages too.
    """

    def error(self, message: str) -> NoReturn:
        """Exit with the message, without the usage text, which is longer than the screen."""
        self.exit(_EXIT_WRONG_USAGE, f"error: {message}\nsee mlx-runner serve --help\n")


def _parser() -> argparse.ArgumentParser:
    """Return a parser whose values are None for options that are not given."""
    parser = _Parser(
        prog="python -m runner_server",
        # `--token SECRET` must not stand for --token-file, whose error message quotes the value.
        allow_abbrev=False,
        description="Hosts one MLX language model and serves it over gRPC. Once listening, it "
        "prints one line on stdout: 1|1|tcp|HOST:PORT|grpc or 1|1|unix|PATH|grpc.",
    )
    for option in SERVER_OPTIONS:
        # argparse applies % formatting to the text.
        text = option.help_text.replace("%", "%%")
        if option.is_switch:
            parser.add_argument(*option.flags, action="store_true", default=None, help=text)
        else:
            parser.add_argument(
                *option.flags,
                action="append" if option.is_repeated else "store",
                type=_reader(option),
                choices=option.choices or None,
                metavar=option.metavar or None,
                help=text,
            )
    return parser


def _reader(option: ServerOption) -> Callable[[str], object]:
    def read(text: str) -> object:
        try:
            return option.read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read
