"""mlx-lm's HTTP server.

The server streams text. Prompts are text only; the load generator checks that the server counts as
many prompt tokens as the other contenders receive. Requests with a seed are served one at a time,
so none is sent. The server closes the connection after each response.
"""

from __future__ import annotations

import asyncio
import sys

from bench.contenders._environment import environment
from bench.contenders._sse import complete, options_of, read_head
from bench.contenders.base import PARALLEL, Probe, Server, free_port
from bench.records import Record, Request


class MlxLmServer(Server):
    """``python -m mlx_lm server``, called with plain HTTP/1.1."""

    name = "mlx-lm server"

    async def start(self) -> None:
        """Start the server, which listens while the model loads and makes requests wait."""
        self.port = free_port()
        command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(self.setup.model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--decode-concurrency", str(PARALLEL), "--log-level", "WARNING"]
        await self._spawn(command, environment(self.setup.blas))
        await self._listening()

    async def stream(self, request: Request, record: Record) -> None:
        """Stream one completion, or fetch a whole one if token ids are wanted."""
        body = {"prompt": request.prompt.text, **options_of(request)}
        await complete(self.port, body, record, whole=request.want_ids)

    def probes(self) -> dict[str, Probe]:
        """Return the call ``GET /health``."""
        return {"health": self._check}

    async def _check(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await read_head(reader)
        await reader.read()
        writer.close()
