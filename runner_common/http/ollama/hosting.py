"""Names, loads and keep-alive of the models in requests."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from runner_common.http.host import StatusError
from runner_common.serving.auth import ForbiddenError
from runner_common.serving.interceptor import UnreadableRequestError
from runner_common.serving.statuses import error_status

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mlxrunner.v1 import runner_pb2 as pb
    from runner_common.http.exchange import Exchange
    from runner_common.http.host import Host, HostedModel
    from runner_common.http.ollama.translation.answers import Stopwatch
    from runner_common.http.ollama.translation.requests import Call

_TAG = ":latest"
"""Tag that Ollama's programs add to names without one. Models have no tags here."""


async def hosted_name(host: Host, exchange: Exchange, name: str) -> str:
    """Return the host's name for a model."""
    if not name.endswith(_TAG):
        return name
    names = {each.name for each in await host.models(exchange.call)}
    return name if name in names else name.removesuffix(_TAG)


async def find(host: Host, exchange: Exchange, name: str) -> HostedModel:
    """Return a model by name.

    Raises:
        StatusError: There is none.
    """
    wanted = await hosted_name(host, exchange, name)
    for model in await host.models(exchange.call):
        if wanted in (model.name, model.path) and model.path:
            return model
    if host.keeper is not None:
        return await host.keeper.find(wanted)
    text = f"no model has the name {name[:100]!r}; GET /api/tags lists them"
    raise StatusError(error_status("MODEL_NOT_FOUND", text, {"model": name}))


def check_keep_alive(host: Host, exchange: Exchange, wanted: Call) -> None:
    """Refuse a keep-alive beyond the host's abilities or the caller's rights.

    Raises:
        UnreadableRequestError: The host cannot unload its model.
        ForbiddenError: The caller may use models, but not unload or pin them.
    """
    if wanted.keep_alive not in (0, math.inf):
        return
    if host.keeper is None:
        if wanted.keep_alive == 0:
            text = "0 unloads a model, and this server keeps its own; a pool unloads models"
            raise UnreadableRequestError([("keep_alive", text)])
    elif not exchange.has_all_rights:
        raise ForbiddenError(
            "the token of this call may use models, but neither unload (keep_alive 0) nor pin them "
            "(less than 0); send the pool's token with all rights"
        )


async def ready(host: Host, exchange: Exchange, wanted: Call, model: str) -> pb.StatusResponse:
    """Load a model if necessary, and check the context against the request.

    Returns:
        The status of the model's runner.

    Raises:
        StatusError: The model cannot be loaded.
        UnreadableRequestError: Its context is shorter than the request needs.
    """
    keeper, call = host.keeper, exchange.call
    status = await (keeper.load(model, call) if keeper else host.status(model, call))
    if wanted.num_ctx is not None and wanted.num_ctx > status.context_length:
        text = (
            f"is {wanted.num_ctx}, and the model is loaded with a context of "
            f"{status.context_length} tokens, which the server's configuration sets"
        )
        raise UnreadableRequestError([("options.num_ctx", text)])
    return status


def on_accept(
    host: Host, wanted: Call, model: str, stopwatch: Stopwatch | None = None
) -> Callable[[], Awaitable[None]]:
    """Return a callback for the moment of acceptance, when the model is in use."""

    async def note() -> None:
        if stopwatch is not None:
            stopwatch.accept()
        if host.keeper is not None and wanted.keep_alive is not None:
            host.keeper.keep(model, wanted.keep_alive)

    return note
