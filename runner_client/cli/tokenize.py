"""``mlx-runner tokenize``: text to token ids and back, with a model's own tokenizer."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from runner_client.cli.shared.access import (
    Credentials,
    access_options,
    address_option,
    first_address,
    open_client,
)
from runner_client.cli.shared.errors import EXIT_CODES
from runner_client.cli.shared.options import json_option, text_or_stdin
from runner_client.cli.shared.output import print_json
from runner_client.cli.shared.session import loaded
from runner_client.process.process import RunnerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Unpack

    from runner_client.rpc.client import RunnerClient


@click.command(
    "tokenize", short_help="Split text into token ids, or join ids into text.", epilog=EXIT_CODES
)
@click.argument("words", metavar="[ADDRESS] TEXT", nargs=-1, required=True)
@address_option("Another way to give ADDRESS")
@click.option(
    "--model", metavar="MODEL", help="Start a runner, load the whole model, and stop the runner."
)
@click.option("--detokenize", is_flag=True, help="TEXT is token ids; join them into text.")
@click.option(
    "--add-special-tokens",
    is_flag=True,
    help="Add the special tokens of a prompt, such as a beginning-of-text token.",
)
@access_options
@json_option
def command(
    words: tuple[str, ...],
    *,
    address: str | None,
    model: str | None,
    detokenize: bool,
    add_special_tokens: bool,
    as_json: bool,
    **credentials: Unpack[Credentials],
) -> None:
    """Split TEXT into token ids, or join token ids into text.

    Give ADDRESS (HOST:PORT, [IPV6]:PORT or unix:/path) to use the tokenizer of a running runner,
    or --model. Ids are printed, and with --detokenize read, as numbers separated by spaces or
    commas. TEXT - reads standard input.
    """
    address, given = _address_and_text(words, address, model)
    if model and any(credentials.values()):
        raise click.UsageError("--token-file and --tls-... need ADDRESS")
    if detokenize and add_special_tokens:
        raise click.UsageError("--add-special-tokens cannot be used with --detokenize")
    content = text_or_stdin(given)
    ids = _ids(content) if detokenize else []
    with _tokenizer(address, model, credentials) as client:
        if detokenize:
            content = client.detokenize(ids)
        else:
            ids = client.tokenize(content, add_special_tokens=add_special_tokens)
    if as_json:
        print_json({"content": content, "token_ids": ids})
    else:
        click.echo(content if detokenize else " ".join(map(str, ids)))


def _address_and_text(
    words: tuple[str, ...], address: str | None, model: str | None
) -> tuple[str | None, str]:
    """Return the address, which may be the first of two words, and the text.

    Raises:
        click.UsageError: Both or neither of model and address were given, or several texts.
    """
    *first, content = words
    if len(first) > 1:
        raise click.UsageError("too many arguments: quote TEXT if it has spaces")
    if len(first) + bool(address) + bool(model) != 1:
        raise click.UsageError("give one of ADDRESS (a running runner) and --model, then TEXT")
    return (first_address(first[0]) if first else address), content


@contextmanager
def _tokenizer(
    address: str | None, model: str | None, credentials: Credentials
) -> Iterator[RunnerClient | RunnerProcess]:
    if address:
        with open_client(address, **credentials) as client:
            yield client
    elif model:
        runner = RunnerProcess(model, parallel=1)
        with loaded(runner, model):
            yield runner


def _ids(content: str) -> list[int]:
    words = content.replace(",", " ").split()
    # Python refuses to convert thousands of digits.
    wrong = [word for word in words if not re.fullmatch("[0-9]{1,30}", word)]
    if wrong:
        shown = wrong[0][:40]
        raise click.BadArgumentUsage(f"{shown!r} is not a token id; TEXT must be whole numbers")
    ids = list(map(int, words))
    if max(ids, default=0) > _MAX_ID:
        raise click.BadArgumentUsage(f"{max(ids)} is not a token id: it is above {_MAX_ID:,}")
    return ids


_MAX_ID = 2**31 - 1
