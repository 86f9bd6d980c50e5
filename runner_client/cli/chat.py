"""``mlx-runner chat``: a conversation in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from runner_client.cli.shared.access import (
    Credentials,
    access_options,
    address_option,
    open_client,
)
from runner_client.cli.shared.dialogue import Dialogue
from runner_client.cli.shared.errors import EXIT_CODES
from runner_client.cli.shared.options import (
    adapter_of,
    adapter_option,
    json_schema_option,
    load_options,
    refuse_options,
    sampling_options,
    text,
)
from runner_client.cli.shared.output import model_rows, print_rows
from runner_client.cli.shared.session import loaded
from runner_client.process.process import RunnerProcess
from runner_client.types import Options

if TYPE_CHECKING:
    from typing import Unpack

    from runner_client.cli.shared.options import Sampling
    from runner_client.types import JsonSchema, LoadOptions


_LOAD_OPTIONS = (
    *("context_length", "dtype", "prefix_cache_bytes"),
    *("memory_override", "allow_inexact", "kv_bits", "draft_model"),
)


@click.command("chat", short_help="Talk with a model.", epilog=EXIT_CODES)
@click.argument("model", required=False)
@click.option("--system", type=text, default="", metavar="TEXT", help="Instructions for the model.")
@address_option("Talk with the loaded model of this runner")
@access_options
@sampling_options
@json_schema_option("Make every answer a JSON value that is valid by the schema in this file.")
@load_options(*_LOAD_OPTIONS)
@adapter_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    *,
    model: str | None,
    system: str,
    address: str | None,
    token_file: str | None,
    tls_ca: str | None,
    tls_cert: str | None,
    tls_key: str | None,
    json_schema: JsonSchema | None,
    load: LoadOptions,
    adapter: str,
    **sampling: Unpack[Sampling],
) -> None:
    """Talk with MODEL, in a runner started for this and stopped afterwards.

    MODEL is a directory, or a hub id (org/name) in the local Hugging Face cache, with a chat
    template. With --address instead of MODEL, a running runner answers with its own model. Every
    line of standard input is a message; /reset begins a new conversation, and /help lists what
    else there is. Ctrl-C ends an answer or drops the message being typed, and twice in a row ends
    the program. Answers go to standard output as they are generated, everything else, the model's
    reasoning included, to standard error.
    """
    credentials: Credentials = {
        "token_file": token_file,
        "tls_ca": tls_ca,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
    }
    if bool(model) == bool(address):
        raise click.UsageError("give one of MODEL and --address")
    if address:
        refuse_options(ctx, _LOAD_OPTIONS, "cannot be used with --address: see load")
    elif any(credentials.values()):
        raise click.UsageError("--token-file and --tls-... need --address")
    options = Options(**sampling)
    adapter, load = adapter_of(adapter, address, load)
    if address:
        with open_client(address, **credentials) as client:
            Dialogue(client, options, system, json_schema, adapter).run()
        return
    name = text(model or "")
    runner = RunnerProcess(name, options=load, parallel=1)
    with loaded(runner, name) as result:
        print_rows(model_rows(result.model), err=True)
        Dialogue(runner, options, system, json_schema, adapter).run()
