"""``GET /v1/models`` and ``GET /v1/models/ID``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from runner_common.http.host import StatusError
from runner_common.serving.statuses import error_status

if TYPE_CHECKING:
    from runner_common.http.body import JsonObject
    from runner_common.http.exchange import Exchange
    from runner_common.http.host import Host, HostedModel

_STARTED = int(time.time())
"""The time that models have as ``created``, since their files do not tell theirs."""


async def list_models(host: Host, exchange: Exchange, _body: JsonObject) -> None:
    """List the models for requests to name."""
    models = [_model(model) for model in await host.models(exchange.call)]
    await exchange.send_json({"object": "list", "data": models})


async def get_model(host: Host, exchange: Exchange, _body: JsonObject) -> None:
    """Describe one model."""
    name = exchange.parameters["model"]
    for model in await host.models(exchange.call):
        if name in (model.name, model.path):
            await exchange.send_json(_model(model))
            return
    text = f"no model has the name {name[:100]!r}; GET /v1/models lists them"
    raise StatusError(error_status("MODEL_NOT_FOUND", text, {"model": name}))


async def named(host: Host, exchange: Exchange, name: str) -> str:
    """Return the model's name for an answer."""
    if name:
        return name
    models = await host.models(exchange.call)
    return models[0].name if len(models) == 1 else ""


def _model(model: HostedModel) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": _STARTED, "owned_by": "mlx-grpc-runner"}
