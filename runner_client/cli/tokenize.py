"""``mlx-runner tokenize``: text to token ids and back, with a model's own tokenizer."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from runner_client.cli.access import Credentials, access_options, open_client
from runner_client.cli.errors import EXIT_CODES
from runner_client.cli.options import json_option, text_or_stdin
from runner_client.cli.output import print_json
from runner_client.cli.session import loaded
from runner_client.process.process import RunnerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Unpack

    from runner_client.rpc.client import RunnerClient


@click.command(
    "tokenize", short_help="Split text into token ids, or join ids into text.", epilog=EXIT_CODES
)
@click.argument("content", metavar="TEXT", type=text_or_stdin)
@click.option("--address", help="Use the runner at this address: HOST:PORT or unix:/path.")
@click.option("--model", help="Start a runner, load the whole model, and stop the runner.")
@click.option("--detokenize", is_flag=True, help="TEXT is token ids; join them into text.")
@click.option(
    "--add-special-tokens",
    is_flag=True,
    help="Add the special tokens of a prompt, such as a beginning-of-text token.",
)
@access_options
@json_option
def command(
    content: str,
    *,
    address: str | None,
    model: str | None,
    detokenize: bool,
    add_special_tokens: bool,
    as_json: bool,
    **credentials: Unpack[Credentials],
) -> None:
    """Split TEXT into token ids, or join token ids into text.

    Give either --address or --model to select the tokenizer. Ids are printed, and with
    --detokenize read, as numbers separated by spaces or commas. TEXT - reads standard input.
    """
    if bool(address) == bool(model):
        raise click.UsageError("give one of --address (a running runner) and --model")
    if model and any(credentials.values()):
        raise click.UsageError("--token-file and --tls-... need --address")
    if detokenize and add_special_tokens:
        raise click.UsageError("--add-special-tokens cannot be used with --detokenize")
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
    wrong = [word for word in words if not (word.isascii() and word.isdecimal())]
    if wrong:
        raise click.BadArgumentUsage(f"{wrong[0]!r} is not a token id; TEXT must be whole numbers")
    ids = list(map(int, words))
    if max(ids, default=0) > _MAX_ID:
        raise click.BadArgumentUsage(f"{max(ids)} is not a token id: it is above {_MAX_ID:,}")
    return ids


_MAX_ID = 2**31 - 1
