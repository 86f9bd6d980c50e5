"""SMG's MLX servicer over gRPC, with tokens in and tokens out.

The servicer needs mlx-lm < 0.32 and therefore a separate environment. A seed would be set on a
thread that does not sample, so none is sent.
"""

from __future__ import annotations

import time
from typing import Any

import grpc

from bench.contenders._environment import environment
from bench.contenders._grpc import in_words, open_channel
from bench.contenders.base import PARALLEL, Probe, Server, free_port
from bench.paths import SMG_PYTHON
from bench.records import TEMPERATURE, TOP_K, TOP_P, ContenderError, Record, Request


class Smg(Server):
    """``python -m smg_grpc_servicer.mlx.server``, called with the generated stubs."""

    name = "SMG"
    _channel: grpc.aio.Channel | None = None

    async def start(self) -> None:
        """Start the server, which listens once the model is loaded and warm."""
        if not SMG_PYTHON.exists():
            raise ContenderError("the environment is missing: run 'make bench'")
        try:
            from smg_grpc_proto import mlx_engine_pb2, mlx_engine_pb2_grpc
        except ImportError as error:
            raise ContenderError(f"the stubs are missing: {error}") from error
        self.port = free_port()
        command = [str(SMG_PYTHON), "-m", "smg_grpc_servicer.mlx.server"]
        command += ["--model", str(self.setup.model), "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--completion-batch-size", str(PARALLEL)]
        await self._spawn(command, environment(self.setup.blas, SMG_PYTHON))
        await self._listening()
        self._channel = open_channel(self.port)
        self._messages: Any = mlx_engine_pb2
        self._stub: Any = mlx_engine_pb2_grpc.MlxEngineStub(self._channel)
        self._sent = 0

    async def stop(self) -> None:
        """Close the channel and stop the process."""
        if self._channel:
            await self._channel.close()
        await super().stop()

    async def stream(self, request: Request, record: Record) -> None:
        """Stream one completion."""
        try:
            async for message in self._stub.Generate(self._message(request)):
                if message.WhichOneof("response") == "chunk":
                    tokens = message.chunk.token_ids
                    record.chunks.append((time.monotonic(), len(tokens)))
                    record.token_ids.extend(tokens)
                else:
                    record.prompt_tokens = message.complete.prompt_tokens
                    record.completion_tokens = message.complete.completion_tokens
        except grpc.aio.AioRpcError as error:
            raise ContenderError(in_words(error)) from error

    def probes(self) -> dict[str, Probe]:
        """Return the servicer's own health call."""
        return {"health": self._check}

    async def _check(self) -> None:
        await self._stub.HealthCheck(self._messages.HealthCheckRequest())

    def _message(self, request: Request) -> Any:
        self._sent += 1
        sampling = self._messages.SamplingParams(temperature=0, max_tokens=request.max_tokens)
        if request.sampled:
            sampling.temperature = TEMPERATURE
            sampling.top_p = TOP_P
            sampling.top_k = TOP_K
        return self._messages.GenerateRequest(
            request_id=str(self._sent),
            tokenized=self._messages.TokenizedInput(input_ids=request.prompt.token_ids),
            sampling_params=sampling,
            stream=True,
        )
