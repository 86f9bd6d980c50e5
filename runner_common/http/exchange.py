"""HTTP requests with their responses."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from runner_common.http.body import JsonObject, read_json
from runner_common.http.call import ID_HEADER, HttpCall

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from starlette.types import Receive, Scope, Send


class Exchange:
    """A request, and a response as JSON value or stream.

    Args:
        path: Path of the route, with its parameters by name.
        scope: The ASGI scope.
        receive: Receives the request's body, and then the disconnection.
        send: Sends the response.

    Attributes:
        verb: HTTP method.
        headers: Headers of the request, in lower case; the last one of several with a name.
        parameters: Parameters of the route's path.
        call: The call that the request is, for the host.
        has_begun: Whether the response has begun, so that its status is decided.
        has_all_rights: Whether the caller may control the process, and not only use models.
    """

    def __init__(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        pairs = [
            (key.decode("latin-1"), value.decode("latin-1")) for key, value in scope["headers"]
        ]
        self.headers: Mapping[str, str] = dict(pairs)
        self.authorizations = [value.encode() for key, value in pairs if key == "authorization"]
        self.verb: str = scope["method"]
        self.parameters: Mapping[str, str] = scope.get("path_params", {})
        self.call = HttpCall(path, pairs)
        self.has_begun = False
        self.has_all_rights = False
        self._receive = receive
        self._send = send
        self._is_disconnected = False

    async def read_json(self, *, takes_any_type: bool = False) -> JsonObject:
        """Return the JSON object of the body; see ``body.read_json``."""
        return await read_json(self.headers, self._receive, takes_any_type=takes_any_type)

    async def send_json(
        self, value: object, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a whole response."""
        body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        size = {"content-length": str(len(body))}
        await self._begin(status, "application/json", {**(headers or {}), **size})
        await self._send({"type": "http.response.body", "body": body})

    async def begin_stream(self, content_type: str) -> None:
        """Begin a response in parts."""
        # Proxies such as nginx would collect the parts.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        await self._begin(200, content_type, headers)

    async def send_part(self, part: bytes) -> None:
        """Send a part; waits while the client reads too slowly."""
        await self._send({"type": "http.response.body", "body": part, "more_body": True})

    async def end_stream(self, part: bytes = b"") -> None:
        """Send the last part."""
        await self._send({"type": "http.response.body", "body": part})

    async def _begin(self, status: int, content_type: str, headers: Mapping[str, str]) -> None:
        self.has_begun = True
        pairs: list[tuple[Any, Any]] = [
            (b"content-type", content_type.encode()),
            (ID_HEADER.encode(), self.call.id.encode()),
        ]
        pairs += [(key.encode(), value.encode()) for key, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    @asynccontextmanager
    async def until_disconnect(self) -> AsyncIterator[None]:
        """Cancel the block when the client disconnects."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - always in a task
        watcher = asyncio.create_task(self._watch(task))
        try:
            yield
        except asyncio.CancelledError:
            # A cancellation by others, such as a shutdown, goes on.
            if not self._is_disconnected or task.uncancel():
                raise
        finally:
            watcher.cancel()

    async def _watch(self, task: asyncio.Task[Any]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._is_disconnected = True
        task.cancel()
