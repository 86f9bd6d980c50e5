"""The routes of Ollama's interface."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from runner_common.http.endpoint import Endpoint
from runner_common.http.ollama.embed import embed, old_embed
from runner_common.http.ollama.generation import chat, generate
from runner_common.http.ollama.listing import running, show, tags, version
from runner_common.http.ollama.refusals import REFUSED, refuse

if TYPE_CHECKING:
    from runner_common.http.body import JsonObject
    from runner_common.http.exchange import Exchange
    from runner_common.http.host import Host


async def _greet(_host: Host, exchange: Exchange, _body: JsonObject) -> None:
    """Return the text by which programs find a running server."""
    await exchange.begin_stream("text/plain; charset=utf-8")
    await exchange.end_stream(b"Ollama is running")


# Examples for curl send JSON as the type of a form.
_endpoint = partial(Endpoint, takes_any_type=True)

OLLAMA_ENDPOINTS = (
    _endpoint("GET", "/", "Status", _greet, is_open=True),
    _endpoint("GET", "/api/version", "Status", version),
    _endpoint("GET", "/api/tags", "Status", tags),
    _endpoint("GET", "/api/ps", "Status", running),
    _endpoint("POST", "/api/show", "Status", show),
    _endpoint("POST", "/api/chat", "Chat", chat),
    _endpoint("POST", "/api/generate", "Completion", generate),
    _endpoint("POST", "/api/embed", "Embed", embed),
    _endpoint("POST", "/api/embeddings", "Embed", old_embed),
    *(_endpoint(verb, path, "Load", refuse) for verb, path in REFUSED),
)
