"""Options of the server's command line.

``python -m runner_server`` parses its arguments by this table. ``mlx-runner serve`` has the same
options and passes them on.
"""

from __future__ import annotations

import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner_common.contract import (
    DEFAULT_PARALLEL,
    KV_BITS,
    MAX_ADAPTER_NAME_CHARS,
    MAX_BYTES,
    MAX_DRAFT,
    MAX_PARALLEL,
    MAX_PORT,
    MIN_CONTEXT_LENGTH,
    PREFIX_CACHE_DIR_VARIABLE,
    PREFIX_CACHE_DISK_VARIABLE,
    TOKEN_VARIABLE,
    USE_TOKEN_VARIABLE,
)
from runner_common.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True)
class ServerOption:
    """One option of the server.

    Attributes:
        flags: Spellings, the usual one first.
        help: Description of the effect, in full sentences.
        metavar: Placeholder of the value in the help text; empty for a switch and for choices.
        read: Converts the text of a value, or raises ValueError with the problem.
        choices: All allowed values; empty if ``read`` decides.
        default: The value if the option is not given; None if there is no default.
        needs: Flag of another option without which this one has no effect.
        is_repeated: Whether the option may be given several times.
    """

    flags: tuple[str, ...]
    help: str
    metavar: str = ""
    read: Callable[[str], object] = str
    choices: tuple[str, ...] = ()
    default: str | float | bool | None = None
    needs: str = ""
    is_repeated: bool = False

    @property
    def flag(self) -> str:
        """The usual spelling."""
        return self.flags[0]

    @property
    def name(self) -> str:
        """The usual spelling as a Python name."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def is_switch(self) -> bool:
        """True for an option without a value."""
        return self.default is False

    @property
    def help_text(self) -> str:
        """The description with the default value."""
        has_default = not self.is_switch and self.default is not None
        return f"{self.help}  [default: {self.default}]" if has_default else self.help


def misuse(given: Collection[str]) -> str | None:
    """Return the problem of an option that lacks another one it needs; None if there is none.

    Args:
        given: Names of the options on the command line.
    """
    named = [option for option in SERVER_OPTIONS if option.name in given]
    flags = {flag for option in named for flag in option.flags}
    wrong = (option for option in named if option.needs and option.needs not in flags)
    return next((f"{option.flag} needs {option.needs}" for option in wrong), None)


def _integer(low: int, high: int = _MAX_INT32) -> Callable[[str], int]:
    """Return a parser of integers from ``low`` to ``high``, the range in the protocol."""
    return lambda text: _in_range(_whole(text, low, high), low, high)


def _whole(text: str, low: int, high: int) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text[:40]!r} is not a whole number ({low} to {high})") from None


def _in_range(number: int, low: int, high: int) -> int:
    if not low <= number <= high:
        raise ValueError(f"{number} is not in the range {low} to {high}")
    return number


def _size(low: int) -> Callable[[str], int]:
    return lambda text: _in_range(parse_bytes(text), low, MAX_BYTES)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{text[:40]!r} is not a number of seconds, 0 or more")
    return value


def _host_and_port(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    if not (separator and host and port.isdecimal() and int(port) <= MAX_PORT):
        raise ValueError(f"{text!r}: expected HOST:PORT, the port 0 to {MAX_PORT}")
    return host.strip("[]"), int(port)


def read_adapter_option(text: str) -> tuple[str, str]:
    """Return the name and the directory of an adapter.

    Raises:
        ValueError: The text is not NAME=DIR.
    """
    name, _, path = text.partition("=")
    if not (name and path and len(name) <= MAX_ADAPTER_NAME_CHARS):
        most = f"a name of at most {MAX_ADAPTER_NAME_CHARS} characters"
        raise ValueError(f"{text[:40]!r}: expected NAME=DIR, {most} and a directory")
    return name, path


def _file(text: str) -> Path:
    path = Path(text)
    try:
        is_directory = stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        raise ValueError(f"{text}: {error.strerror}") from error
    if is_directory:
        raise ValueError(f"{text} is a directory")
    return path


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise ValueError(f"{text} is not a directory")
    return path.resolve()


def _new_directory(text: str) -> Path:
    # Of a variable that is not set, and Path would make the current directory of it.
    if not text:
        raise ValueError("expected a directory, not an empty text")
    return Path(text)


SERVER_OPTIONS = (
    ServerOption(
        ("--listen",),
        "HOST:PORT or unix:/path; port 0 picks a free one. An address reachable from other "
        "machines needs a token or TLS.",
        metavar="ADDRESS",
        default="127.0.0.1:0",
    ),
    ServerOption(
        ("--model",),
        "Directory or cached hub id of a model to load at the start, which fails if the load "
        "does. Without it the server waits for a Load call.",
        metavar="MODEL",
    ),
    ServerOption(
        ("--context-length",),
        f"Longest sequence, prompt and text together, in tokens; at least {MIN_CONTEXT_LENGTH}.  "
        "[default: the model's own limit, at most 4096]",
        metavar="N",
        read=_integer(MIN_CONTEXT_LENGTH),
        needs="--model",
    ),
    ServerOption(
        ("--parallel",),
        f"Maximum number of completions decoded together, 1 to {MAX_PARALLEL}.",
        metavar="N",
        read=_integer(1, MAX_PARALLEL),
        default=DEFAULT_PARALLEL,
        needs="--model",
    ),
    ServerOption(
        ("--dtype",),
        "Number format of the weights in memory. auto: float32 on a CPU, otherwise as stored. "
        "auto_or_stored: like auto if that fits, otherwise as stored, which is slow on a CPU.",
        choices=("auto", "auto_or_stored", "as_stored", "float32", "bfloat16", "float16"),
        default="auto",
        needs="--model",
    ),
    ServerOption(
        ("--memory-limit", "--memory-limit-bytes"),
        "Upper limit of MLX's memory, such as 8GiB.  [default: the estimated need]",
        metavar="SIZE",
        read=_size(1),
        needs="--model",
    ),
    ServerOption(
        ("--prefix-cache", "--prefix-cache-bytes"),
        "Upper limit of the prefix cache, which spares a prompt the prefill of the beginning it "
        "shares with an earlier one; 0 is off.  [default: one sequence, or a quarter of all; less "
        "if memory is short]",
        metavar="SIZE",
        read=_size(0),
        needs="--model",
    ),
    ServerOption(
        ("--kv-bits",),
        "Bits of each number in the KV caches: 4 or 8 hold more tokens in the same memory, and "
        "change the texts a little; 0 keeps the number format of the weights.",
        choices=tuple(map(str, KV_BITS)),
        default="0",
        needs="--model",
    ),
    ServerOption(
        ("--adapter",),
        "LoRA or DoRA adapter to load with the model, as mlx_lm writes it, and the name by which "
        "requests select it; may be repeated.",
        metavar="NAME=DIR",
        read=read_adapter_option,
        needs="--model",
        is_repeated=True,
    ),
    ServerOption(
        ("--draft-model",),
        "Directory or cached hub id of a small model with the same tokens, which proposes the next "
        "tokens of a completion that is alone. It turns itself off where that does not pay.",
        metavar="MODEL",
        needs="--model",
    ),
    ServerOption(
        ("--prefix-cache-dir",),
        "Directory that keeps the prefix cache beyond the process, private to this user; created "
        "if necessary. Several servers may share it. Its files reveal prompts and texts.  "
        f"[default: {PREFIX_CACHE_DIR_VARIABLE} if set, otherwise none]",
        metavar="DIR",
        read=_new_directory,
    ),
    ServerOption(
        ("--prefix-cache-disk", "--prefix-cache-disk-bytes"),
        "Upper limit of all files of the prefix cache on disk.  "
        f"[default: {PREFIX_CACHE_DISK_VARIABLE} if set, otherwise 8GiB]",
        metavar="SIZE",
        read=_size(1),
    ),
    ServerOption(
        ("--max-queued",),
        "Maximum number of completions that wait in the queue, at least 1.",
        metavar="N",
        read=_integer(1),
        default=128,
    ),
    ServerOption(
        ("--draft-tokens",),
        "Most tokens of a draft, which speeds up a completion that is alone where its text repeats "
        f"the prompt or itself, 0 to {MAX_DRAFT}; 0 is off. Drafts turn themselves off where they "
        "do not pay.",
        metavar="N",
        read=_integer(0, MAX_DRAFT),
        default=MAX_DRAFT,
    ),
    ServerOption(
        ("--stall-seconds",),
        "Exit with code 71 if the engine has work but makes no progress for this long; 0 is off.",
        metavar="SECONDS",
        read=_seconds,
        default=120.0,
    ),
    ServerOption(
        ("--exit-with-parent",),
        "Exit within 2 s of the parent process; stdin should be a pipe that only the parent holds.",
        default=False,
    ),
    ServerOption(
        ("--token-file",),
        "File with the token that every call must send as `authorization: Bearer TOKEN`.  "
        f"[default: {TOKEN_VARIABLE} if set]",
        metavar="FILE",
        read=_file,
    ),
    ServerOption(
        ("--use-token-file",),
        "File with a second token, whose holders may only complete, tokenize, detokenize and read "
        "the status; --token-file then has the token with all rights.  "
        f"[default: {USE_TOKEN_VARIABLE} if set]",
        metavar="FILE",
        read=_file,
    ),
    ServerOption(
        ("--tls-cert",),
        "Certificate chain, PEM; reloaded when it changes.",
        metavar="FILE",
        read=_file,
        needs="--tls-key",
    ),
    ServerOption(
        ("--tls-key",),
        "Private key of --tls-cert, PEM without a password.",
        metavar="FILE",
        read=_file,
        needs="--tls-cert",
    ),
    ServerOption(
        ("--tls-client-ca",),
        "CA certificates, PEM; clients must have a certificate signed by one of them.",
        metavar="FILE",
        read=_file,
        needs="--tls-cert",
    ),
    ServerOption(
        ("--model-root",),
        "Only load models below this directory; links are resolved.",
        metavar="DIR",
        read=_directory,
    ),
    ServerOption(
        ("--http",),
        "Address for OpenAI's and Ollama's HTTP interfaces, such as 127.0.0.1:8080, with the "
        "tokens and TLS files of --listen; needs the extra http.  [default: none]",
        metavar="HOST:PORT",
        read=_host_and_port,
    ),
    ServerOption(
        ("--metrics-listen",),
        "Address for Prometheus metrics, such as 127.0.0.1:9464.  [default: none]",
        metavar="HOST:PORT",
        read=_host_and_port,
    ),
    ServerOption(
        ("--log-level",),
        "Level of the log on standard error.",
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
        default="INFO",
    ),
    ServerOption(
        ("--log-format",),
        "Format of the log on standard error.",
        choices=("text", "json"),
        default="text",
    ),
    ServerOption(
        ("--distributed",),
        "Hold the model together with the other processes started by mlx.launch; rank 0 serves.",
        default=False,
    ),
    ServerOption(
        ("--pipeline",),
        "Give each process some layers of the model, even if every layer could be split.",
        default=False,
        needs="--distributed",
    ),
    ServerOption(
        ("--smg",),
        "Also serve as a worker of the SMG gateway; needs the extra smg.",
        default=False,
    ),
    ServerOption(
        ("--vllm",),
        "Also serve the contract of vLLM's workers, which the SMG gateway prefers if a server has "
        "both; needs the extra smg.",
        default=False,
    ),
)
"""All options, in the order of the help texts."""
