"""``GET /api/tags``, ``GET /api/ps``, ``POST /api/show`` and ``GET /api/version``."""

from __future__ import annotations

import asyncio
import math
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from mlxrunner.v1 import pool_pb2
from runner_common.http.host import StatusError
from runner_common.http.ollama.hosting import find
from runner_common.http.ollama.model_files import describe_files
from runner_common.http.ollama.translation.fields import Fields
from runner_common.http.ollama.translation.requests import read_model
from runner_common.serving.statuses import error_status

if TYPE_CHECKING:
    from mlxrunner.v1 import runner_pb2 as pb
    from runner_common.http.body import JsonObject
    from runner_common.http.exchange import Exchange
    from runner_common.http.host import Host, HostedModel
    from runner_common.http.ollama.model_files import ModelFiles

API_VERSION = "0.20.0"
"""The version of Ollama whose interface this is: programs compare it with the one they need."""

_FOREVER = timedelta(days=365 * 100)
_TOOL_SIGNS = ("tools",)
_THINKING_SIGNS = ("<think>", "enable_thinking", "reasoning_content", "reasoning_effort")


async def version(_host: Host, exchange: Exchange, _body: JsonObject) -> None:
    """Return the version of the interface."""
    await exchange.send_json({"version": API_VERSION})


async def tags(host: Host, exchange: Exchange, _body: JsonObject) -> None:
    """List the models for requests to name."""
    found = []
    for listed in await host.models(exchange.call):
        model = await _located(host, listed)
        files = await _files(model)
        if files is not None:
            entry = _entry(model, files, files.size_bytes)
            found.append(entry | {"modified_at": files.modified_at})
    await exchange.send_json({"models": found})


async def running(host: Host, exchange: Exchange, _body: JsonObject) -> None:
    """List the models in memory."""
    found = []
    for model in await host.models(exchange.call):
        entry = await _running(host, exchange, model)
        if entry is not None:
            found.append(entry)
    await exchange.send_json({"models": found})


async def show(host: Host, exchange: Exchange, body: JsonObject) -> None:
    """Describe one model, loaded or not."""
    fields = Fields(body)
    # The name's former name.
    former = fields.text("name")
    name = former if former and not fields.text("model") else read_model(fields)
    if fields.flag("verbose"):
        fields.refuse("verbose", "is not supported: tensors are not listed")
    fields.refuse_set(("system", "template", "options"), "is not supported: nothing is changed")
    fields.finish()
    model = await find(host, exchange, name)
    files = await _files(model)
    if files is None:
        text = f"the files of {model.name!r} cannot be read"
        raise StatusError(error_status("MODEL_UNSUPPORTED", text, {"model": model.name}))
    status = await _status(host, exchange, model)
    family = files.family
    answer = {
        "modelfile": f"# Described by the model's own files.\nFROM {model.path}\n",
        "parameters": "",
        "template": files.template,
        "details": _details(files),
        "model_info": {
            "general.architecture": family,
            "general.basename": model.name,
            "general.parameter_count": files.parameter_count,
            f"{family}.context_length": files.context_length,
            **{f"{family}.{part}": size for part, size in files.sizes.items()},
        },
        "capabilities": _capabilities(files, status),
        "modified_at": files.modified_at,
    }
    await exchange.send_json(answer)


async def _located(host: Host, model: HostedModel) -> HostedModel:
    """Return a model with the path. A pool may not have looked for the files yet."""
    if model.path or host.keeper is None:
        return model
    try:
        return await host.keeper.find(model.name)
    except StatusError:
        return model


async def _files(model: HostedModel) -> ModelFiles | None:
    return await asyncio.to_thread(describe_files, model.path) if model.path else None


def _is_loaded(model: HostedModel) -> bool:
    if model.pooled is not None:
        return model.pooled.state == pool_pb2.POOL_MODEL_STATE_READY
    return model.loaded is not None


async def _status(host: Host, exchange: Exchange, model: HostedModel) -> pb.StatusResponse | None:
    """Return the status of a loaded model's runner; otherwise None."""
    if not _is_loaded(model):
        return None
    try:
        return await host.status(model.name, exchange.call)
    except StatusError:
        # Unloaded since the models were listed.
        return None


async def _running(host: Host, exchange: Exchange, model: HostedModel) -> dict[str, Any] | None:
    status, files = await _status(host, exchange, model), await _files(model)
    if status is None or files is None:
        return None
    usage = status.memory_usage
    held_bytes = model.pooled.held_bytes if model.pooled is not None else usage.reserved_bytes
    is_on_gpu = not status.device.startswith("cpu")
    seconds = math.inf if host.keeper is None else host.keeper.kept_seconds(model.name)
    return _entry(model, files, held_bytes) | {
        "expires_at": _expiry(seconds),
        "size_vram": held_bytes if is_on_gpu else 0,
        "context_length": status.context_length,
    }


def _expiry(seconds: float) -> str:
    stays = timedelta(seconds=seconds) if seconds < _FOREVER.total_seconds() else _FOREVER
    return (datetime.now(UTC) + stays).isoformat()


def _entry(model: HostedModel, files: ModelFiles, size_bytes: int) -> dict[str, Any]:
    return {
        "name": model.name,
        "model": model.name,
        "size": size_bytes,
        "digest": files.digest,
        "details": _details(files),
    }


def _details(files: ModelFiles) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": files.family,
        "families": [files.family],
        "parameter_size": _rounded(files.parameter_count),
        "quantization_level": files.quantization,
        "context_length": files.context_length,
        "embedding_length": files.sizes.get("embedding_length", 0),
    }


def _rounded(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def _capabilities(files: ModelFiles, status: pb.StatusResponse | None) -> list[str]:
    """Return a model's abilities. Without a load, the template suggests some of them."""
    if status is not None:
        known = status.model.capabilities
        has = {
            "completion": known.completion,
            "tools": known.tools,
            "thinking": known.reasoning,
            "embedding": known.embedding_dimension > 0,
        }
    else:
        has = {
            "completion": files.completes,
            "tools": any(sign in files.template for sign in _TOOL_SIGNS),
            "thinking": any(sign in files.template for sign in _THINKING_SIGNS),
            "embedding": files.embeds,
        }
    return [name for name, is_there in has.items() if is_there]
