"""Arguments and options shared by several commands, and their value types."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, get_args

import click
from click.core import ParameterSource

from runner_client.cli.shared.numbers import Number, integer, number_option
from runner_client.types import Dtype, JsonSchema, LoadOptions
from runner_common.contract import DEFAULT_PARALLEL, KV_BITS, MAX_PARALLEL, MIN_CONTEXT_LENGTH
from runner_common.server_options import SERVER_OPTIONS, read_adapter_option
from runner_common.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from click.decorators import FC

_Result = TypeVar("_Result")


def size(value: str) -> int:
    """Parse a size above 0; see ``parse_bytes``.

    Raises:
        click.BadParameter: The value is not a size, or is 0.
    """
    count = size_or_zero(value)
    if not count:
        raise click.BadParameter("the size must be above 0")
    return count


def size_or_zero(value: str) -> int:
    """Parse a size; see ``parse_bytes``.

    Raises:
        click.BadParameter: The value is not a size.
    """
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def kv_bits(value: str) -> int:
    """Parse the bits of a number in the KV caches.

    Raises:
        click.BadParameter: The value is not a possible number of bits.
    """
    allowed = {str(bits): bits for bits in KV_BITS}
    if value not in allowed:
        raise click.BadParameter(f"{value!r} is not one of {', '.join(allowed)}")
    return allowed[value]


def text(value: str) -> str:
    """Validate an argument as text for the runner.

    Raises:
        click.BadParameter: The argument contains bytes that are not characters.
    """
    # Such bytes arrive as lone surrogates.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise click.BadParameter("it contains bytes that are not text")
    return value


def text_or_stdin(value: str) -> str:
    """Return an argument, or for ``-`` the text of standard input, read as UTF-8.

    Raises:
        click.BadParameter: The input is not valid text.
    """
    if value != "-":
        return text(value)
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"not UTF-8: {error.reason} at byte {error.start}") from error


def schema_in(file: str) -> JsonSchema:
    """Read a JSON schema from a file. The runner checks the keywords.

    Raises:
        click.BadParameter: The file cannot be read, or is not JSON.
    """
    try:
        content = Path(file).read_text(encoding="utf-8")
        json.loads(content)
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{file} cannot be read: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise click.BadParameter(f"{file} is not JSON: {error}") from error
    return JsonSchema(content)


def _adapter(value: str) -> tuple[str, str]:
    try:
        return read_adapter_option(text(value))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


_HELP = {option.name: option.help_text for option in SERVER_OPTIONS}

_LOAD = {
    "context_length": click.option(
        "--context-length",
        type=integer(MIN_CONTEXT_LENGTH, high_name="the model's own limit"),
        metavar="N",
        help=_HELP["context_length"],
    ),
    "parallel": click.option(
        "--parallel",
        type=integer(1, MAX_PARALLEL),
        metavar="N",
        default=DEFAULT_PARALLEL,
        help=_HELP["parallel"],
    ),
    "dtype": click.option(
        "--dtype", type=click.Choice(get_args(Dtype)), default="auto", help=_HELP["dtype"]
    ),
    "memory_limit_bytes": click.option(
        "--memory-limit",
        "memory_limit_bytes",
        type=size,
        metavar="SIZE",
        help=_HELP["memory_limit"],
    ),
    "prefix_cache_bytes": click.option(
        "--prefix-cache",
        "prefix_cache_bytes",
        type=size_or_zero,
        metavar="SIZE",
        help=_HELP["prefix_cache"],
    ),
    "memory_override": click.option(
        "--memory-override", is_flag=True, help="Load the model even if it does not fit."
    ),
    "allow_inexact": click.option(
        "--allow-inexact",
        is_flag=True,
        help="Accept a model that cannot be computed exactly as its files specify; the "
        "differences are printed.",
    ),
    "kv_bits": click.option(
        "--kv-bits", type=kv_bits, metavar="0|4|8", default="0", help=_HELP["kv_bits"]
    ),
    "adapters": click.option(
        "--adapter",
        "adapters",
        type=_adapter,
        multiple=True,
        metavar="NAME=DIR",
        help=_HELP["adapter"],
    ),
    "draft_model": click.option(
        "--draft-model", type=text, metavar="MODEL", help=_HELP["draft_model"]
    ),
}
"""Options of a load, by the fields of ``types.LoadOptions``."""


def load_options(*names: str) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """Add options of a load, which the command receives as one ``LoadOptions`` named ``load``.

    Args:
        names: Fields of ``LoadOptions``, in the order of the help text. Default: all.
    """
    fields = names or tuple(_LOAD)

    def decorate(command: Callable[..., _Result]) -> Callable[..., _Result]:
        @functools.wraps(command)
        def with_options(**values: Any) -> _Result:  # noqa: ANN401 - of all options
            given = {name: values.pop(name) for name in fields}
            if "adapters" in given:
                given["adapters"] = _unique(given["adapters"])
            return command(**values, load=LoadOptions(**given))

        for name in reversed(fields):
            with_options = _LOAD[name](with_options)
        return with_options

    return decorate


def _unique(adapters: Collection[tuple[str, str]]) -> dict[str, str]:
    """Return the directories of adapters by name.

    Raises:
        click.UsageError: Two have the same name.
    """
    found = dict(adapters)
    if len(found) < len(adapters):
        raise click.UsageError("--adapter: two adapters have the same name")
    return found


adapter_option = click.option(
    "--adapter",
    type=text,
    default="",
    metavar="DIR|NAME",
    help="LoRA or DoRA adapter to use: its directory, or with --address the name of one that is "
    "loaded.",
)


def adapter_of(given: str, address: str | None, load: LoadOptions) -> tuple[str, LoadOptions]:
    """Return the name of the adapter to use, and the options of the load.

    Args:
        given: The value of ``adapter_option``.
        address: The address of a running runner; None if one is started.
        load: The other options of the load.
    """
    if address or not given:
        return given, load
    return "adapter", replace(load, adapters={"adapter": given})


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output."
)


def refuse_options(ctx: click.Context, names: Collection[str], reason: str) -> None:
    """Refuse options given on the command line that would have no effect.

    Raises:
        click.UsageError: One of ``names`` was given; the message is the option and ``reason``.
    """
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if name in names and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[0]} {reason}")


class Sampling(TypedDict):
    """Values of ``sampling_options``, by the names of ``types.Options``."""

    temperature: float | None
    top_p: float | None
    min_p: float | None
    top_k: int | None
    repeat_last_n: int | None
    repeat_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    num_predict: int | None
    seed: int | None
    stop: tuple[str, ...]


_SAMPLING = (
    number_option(
        "--temperature",
        Number(0, 100),
        "Sampling temperature; 0 takes the most likely token.",
        "0.8",
    ),
    number_option(
        "--top-p",
        Number(0, 1, is_above=True),
        "Sample from the tokens that together have this probability.",
        "0.9",
    ),
    number_option(
        "--top-k",
        integer(0, high_name="the size of the vocabulary"),
        "Sample from this many most likely tokens; 0 is off.",
        "40",
    ),
    number_option(
        "--min-p",
        Number(0, 1),
        "Drop tokens less likely than this fraction of the likeliest.",
        "0",
    ),
    number_option(
        "--seed", integer(-(2**63), 2**63 - 1), "The same seed gives the same text.", "random"
    ),
    number_option(
        "--num-predict",
        integer(1),
        "Maximum number of tokens to generate.",
        "to the end of the context",
    ),
    click.option(
        "--stop",
        type=text,
        multiple=True,
        help="End the text before this string; may be repeated.",
    ),
    number_option(
        "--repeat-penalty",
        Number(0.01, 100),
        "Make repeated tokens less likely; 1 is off.",
        "1",
    ),
    number_option(
        "--repeat-last-n",
        integer(-1),
        "How many of the last tokens the penalties consider; -1 is all.",
        "64",
    ),
    number_option(
        "--presence-penalty",
        Number(-100, 100),
        "Subtracted once from the logits of repeated tokens.",
        "0",
    ),
    number_option(
        "--frequency-penalty",
        Number(-100, 100),
        "Subtracted for each occurrence of repeated tokens.",
        "0",
    ),
)


def sampling_options(command: FC) -> FC:
    """Add the options of a completion, with the ranges of the proto."""
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


def json_schema_option(help_text: str) -> Callable[[FC], FC]:
    """Add an option for a file with a JSON schema, which the command receives as the schema."""
    return click.option("--json-schema", type=schema_in, metavar="FILE", help=help_text)
