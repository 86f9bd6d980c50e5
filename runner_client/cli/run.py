"""``mlx-runner run``: one completion, in a temporary runner or a running one."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from runner_client.cli.shared.access import (
    Credentials,
    access_options,
    address_option,
    open_client,
)
from runner_client.cli.shared.errors import EXIT_CODES
from runner_client.cli.shared.options import (
    adapter_of,
    adapter_option,
    json_option,
    json_schema_option,
    load_options,
    refuse_options,
    sampling_options,
    text,
    text_or_stdin,
)
from runner_client.cli.shared.output import completion_rows, model_rows, print_json, print_rows
from runner_client.cli.shared.session import loaded, show_nothing, show_text, streamed
from runner_client.process.process import RunnerProcess
from runner_client.types import Options

if TYPE_CHECKING:
    from typing import Unpack

    from runner_client.cli.shared.options import Sampling
    from runner_client.rpc.client import RunnerClient
    from runner_client.types import Completion, JsonSchema, LoadOptions, LoadResult


_LOAD_OPTIONS = (
    *("context_length", "dtype", "prefix_cache_bytes"),
    *("memory_override", "allow_inexact", "kv_bits", "draft_model"),
)


@click.command("run", short_help="Complete a prompt with a model.", epilog=EXIT_CODES)
@click.argument("words", metavar="[MODEL] PROMPT", nargs=-1, required=True)
@address_option("Ask this runner and its loaded model")
@access_options
@sampling_options
@json_schema_option("Make the text a JSON value that is valid by the schema in this file.")
@load_options(*_LOAD_OPTIONS)
@adapter_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    *,
    words: tuple[str, ...],
    address: str | None,
    token_file: str | None,
    tls_ca: str | None,
    tls_cert: str | None,
    tls_key: str | None,
    json_schema: JsonSchema | None,
    load: LoadOptions,
    adapter: str,
    as_json: bool,
    **sampling: Unpack[Sampling],
) -> None:
    """Complete PROMPT with MODEL, in a runner started for this and stopped afterwards.

    MODEL is a directory, or a hub id (org/name) in the local Hugging Face cache; nothing is
    downloaded. With --address instead of MODEL, a running runner completes PROMPT with its own
    model. PROMPT is used as is, without a chat template; - reads it from standard input. The text
    goes to standard output as it is generated, everything else to standard error.
    """
    credentials: Credentials = {
        "token_file": token_file,
        "tls_ca": tls_ca,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
    }
    model, given = _model_and_prompt(words, address)
    if address:
        refuse_options(ctx, _LOAD_OPTIONS, "cannot be used with --address: see load")
    elif any(credentials.values()):
        raise click.UsageError("--token-file and --tls-... need --address")
    prompt = text_or_stdin(given)
    if not prompt:
        raise click.BadArgumentUsage("PROMPT is empty")
    options = Options(**sampling)
    adapter, load = adapter_of(adapter, address, load)
    if address:
        with open_client(address, **credentials) as client:
            completion = _streamed(client, prompt, options, json_schema, adapter, as_json=as_json)
        _show(None, completion, as_json=as_json)
        return
    runner = RunnerProcess(model, options=load, parallel=1)
    with loaded(runner, model) as result:
        completion = _streamed(runner, prompt, options, json_schema, adapter, as_json=as_json)
    _show(result, completion, as_json=as_json)


def _model_and_prompt(words: tuple[str, ...], address: str | None) -> tuple[str, str]:
    """Return the model, which is "" with an address, and the prompt.

    Raises:
        click.UsageError: Both or neither of model and address were given, or several prompts.
    """
    *first, prompt = words
    if len(first) > 1:
        raise click.UsageError("too many arguments: quote PROMPT if it has spaces")
    if len(first) + bool(address) != 1:
        raise click.UsageError("give one of MODEL and --address, then PROMPT")
    return text(first[0]) if first else "", prompt


def _streamed(
    client: RunnerClient | RunnerProcess,
    prompt: str,
    options: Options,
    constraint: JsonSchema | None,
    adapter: str,
    *,
    as_json: bool,
) -> Completion:
    stream = client.completion(prompt, options=options, constraint=constraint, adapter=adapter)
    return streamed(stream, show_nothing if as_json else show_text)


def _show(load: LoadResult | None, completion: Completion, *, as_json: bool) -> None:
    """Print both results as JSON, or end the line of text and print the figures."""
    if as_json:
        print_json({**(asdict(load) if load else {}), **asdict(completion)})
        return
    click.echo()
    rows = completion_rows(completion)
    if load:
        rows += [("load", f"{load.load_seconds:.2f} s"), *model_rows(load.model)]
    print_rows(rows, err=True)
