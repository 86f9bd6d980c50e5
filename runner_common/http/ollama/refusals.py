"""Refused routes: the server neither fetches nor changes models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from google.rpc import status_pb2

from runner_common.http.host import StatusError

if TYPE_CHECKING:
    from runner_common.http.body import JsonObject
    from runner_common.http.exchange import Exchange
    from runner_common.http.host import Host

_WHY = {
    "pull": "this server never downloads; run `mlx-runner pull` on its machine",
    "push": "this server never uploads",
    "create": "models are directories with files of mlx_lm, on the server's machine",
    "copy": "name a model by its directory or hub id instead",
    "delete": "this server removes no files; keep_alive 0 frees a model's memory",
}

REFUSED = (
    *(("POST", f"/api/{name}") for name in ("pull", "push", "create", "copy")),
    ("DELETE", "/api/delete"),
)
"""Verbs and paths."""


async def refuse(_host: Host, exchange: Exchange, _body: JsonObject) -> None:
    """Refuse a request by the name of the route.

    Raises:
        StatusError: Always.
    """
    name = exchange.call.path.rpartition("/")[2]
    code = grpc.StatusCode.UNIMPLEMENTED.value[0]
    text = f"/api/{name} is not supported: {_WHY[name]}"
    raise StatusError(status_pb2.Status(code=code, message=text))
