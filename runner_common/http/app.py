"""Application with the HTTP interfaces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import JSONResponse
from starlette.routing import Router

from runner_common.http.endpoint import Endpoint
from runner_common.http.host import StatusError
from runner_common.http.ollama.dialect import OllamaDialect
from runner_common.http.ollama.routes import OLLAMA_ENDPOINTS
from runner_common.http.openai.dialect import OpenAiDialect
from runner_common.http.openai.routes import OPENAI_ENDPOINTS

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from runner_common.http.body import JsonObject
    from runner_common.http.exchange import Exchange
    from runner_common.http.guard import Guard
    from runner_common.http.host import Host


def make_app(host: Host, guard: Guard) -> ASGIApp:
    """Return the application for a host.

    Args:
        host: The runner or pool that answers.
        guard: Decides who may call.
    """
    openai, ollama = OpenAiDialect(), OllamaDialect()
    routes = [
        *(each.route(host, guard, openai) for each in (*OPENAI_ENDPOINTS, _HEALTH)),
        *(each.route(host, guard, ollama) for each in OLLAMA_ENDPOINTS),
    ]
    return Router(routes, redirect_slashes=False, default=_unknown)


async def _health(host: Host, exchange: Exchange, _body: JsonObject) -> None:
    """Answer whether requests are accepted now, for load balancers."""
    if status := host.problem():
        raise StatusError(status)
    await exchange.send_json({"status": "ok"})


_HEALTH = Endpoint("GET", "/health", "Status", _health, is_open=True)


async def _unknown(scope: Scope, receive: Receive, send: Send) -> None:
    text = f"unknown URL: {scope['method']} {scope['path'][:200]}; see docs/http.md"
    if scope["path"].startswith("/api/"):
        await JSONResponse({"error": text}, status_code=404)(scope, receive, send)
        return
    error = {
        "message": text,
        "type": "invalid_request_error",
        "param": None,
        "code": "unknown_url",
    }
    await JSONResponse({"error": error}, status_code=404)(scope, receive, send)
