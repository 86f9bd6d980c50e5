"""Time that a pool adds to each request and each message: ``python -m bench.pool_overhead``.

Requests go to a runner and to a pool with the same model in turns. For messages, a source in place
of a runner sends its clock every few milliseconds, and the reader compares it with its own; the
part of the pool that passes messages on runs between them.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from types import SimpleNamespace
from typing import Any

import grpc

from bench.paths import DEMO_MODEL
from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from runner_client.pool.scheduling.settings import PoolSettings
from runner_client.pool.serving.completions import Completions
from runner_client.pool.serving.forward import Forwarder
from runner_client.pool.serving.names import ModelNames
from runner_client.pool.serving.runner_service import METHODS, PooledRunnerService
from runner_client.pool.serving.translate import translate
from runner_common.contract import SERVICE_NAME
from runner_common.handshake import ReadyLine
from runner_common.serving.interceptor import ErrorInterceptor

MODEL = str(DEMO_MODEL)
INTERVAL_SECONDS = 0.005
SERVER = ("-m", "runner_server", "--listen", "127.0.0.1:0", "--model", MODEL)
POOL = ("-m", "runner_common.console", "pool", "--listen", "127.0.0.1:0")


def main() -> None:
    """Print medians of both ways, and the differences."""
    parser = argparse.ArgumentParser(prog="python -m bench.pool_overhead", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="requests and messages")
    parser.add_argument("--serve", choices=["source", "relay"], help=argparse.SUPPRESS)
    parser.add_argument("--source", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(_serve(args.source))
        return
    with ExitStack() as stack:
        runner = stack.enter_context(_started(*SERVER))
        pool = stack.enter_context(_started(*POOL))
        _wait_until_loaded(runner)
        for name, call in (("Tokenize", _tokenize), ("Completion of one token", _complete)):
            direct, pooled = _timed(args.count, call, runner, pool)
            _report(name, direct, pooled)
    with ExitStack() as stack:
        this = ("-m", "bench.pool_overhead", "--serve")
        source = stack.enter_context(_started(*this, "source"))
        relay = stack.enter_context(_started(*this, "relay", "--source", source))
        _report("Message of a stream", _ages(source, args.count), _ages(relay, args.count))


def _report(name: str, direct: list[float], pooled: list[float]) -> None:
    plain, through = (statistics.median(each) * 1e3 for each in (direct, pooled))
    plain_99, through_99 = (
        statistics.quantiles(each, n=100)[98] * 1e3 for each in (direct, pooled)
    )
    print(
        f"{name:24} direct {plain:.2f} ms (p99 {plain_99:.2f}), through the pool {through:.2f} ms "
        f"(p99 {through_99:.2f}): {through - plain:+.2f} ms"
    )


@contextmanager
def _started(*arguments: str) -> Iterator[str]:
    """Start a server; yield its address."""
    command = [sys.executable, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            lines: Any = process.stdout
            yield ReadyLine.parse(lines.readline()).target
        finally:
            process.terminate()


def _stub(address: str) -> runner_pb2_grpc.RunnerServiceStub:
    channel = grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])
    return runner_pb2_grpc.RunnerServiceStub(channel)


def _wait_until_loaded(address: str) -> None:
    stub = _stub(address)
    while stub.Status(pb.StatusRequest(), wait_for_ready=True).state != pb.STATE_ACTIVE:
        time.sleep(0.05)


def _tokenize(stub: runner_pb2_grpc.RunnerServiceStub) -> None:
    stub.Tokenize(pb.TokenizeRequest(content="import os", model=MODEL))


def _complete(stub: runner_pb2_grpc.RunnerServiceStub) -> None:
    options = pb.CompletionOptions(num_predict=1, temperature=0)
    request = pb.CompletionRequest(prompt="import os", options=options, model=MODEL)
    list(stub.Completion(request))


def _timed(
    count: int, call: Callable[[runner_pb2_grpc.RunnerServiceStub], None], *addresses: str
) -> list[list[float]]:
    """Return the durations of calls to each address, made in turns."""
    stubs = [_stub(address) for address in addresses]
    durations: list[list[float]] = [[] for _ in stubs]
    for number in range(count + 20):
        for stub, found in zip(stubs, durations, strict=True):
            began = time.monotonic()
            call(stub)
            # The first calls load the model and are the warm-up.
            if number >= 20:
                found.append(time.monotonic() - began)
    return durations


def _ages(address: str, count: int) -> list[float]:
    """Return the ages of messages on arrival."""
    options = pb.CompletionOptions(num_predict=count)
    request = pb.CompletionRequest(prompt="x", options=options, model="model")
    ages = [
        time.monotonic() - float(message.content) for message in _stub(address).Completion(request)
    ]
    return ages[20:]


async def _clock(request: pb.CompletionRequest, _context: object) -> AsyncIterator[bytes]:
    """Stream the time of this machine, in place of a runner's text."""
    for _ in range(request.options.num_predict):
        await asyncio.sleep(INTERVAL_SECONDS)
        message = pb.CompletionResponse(content=repr(time.monotonic()), token_ids=[1])
        yield message.SerializeToString()


class _Member:
    """The source in place of a runner."""

    def __init__(self, address: str) -> None:
        self.process = SimpleNamespace(address=address, token=None, peer=None)


class _Pool:
    """A pool whose only model is the source."""

    def __init__(self, address: str) -> None:
        self._member = _Member(address)

    @asynccontextmanager
    async def lease(self, _model: str) -> AsyncIterator[_Member]:
        """Lease the source."""
        yield self._member


async def _serve(source: str) -> None:
    """Serve the source, or the part of a pool that passes its messages on."""
    if source:
        server = grpc.aio.server(interceptors=[ErrorInterceptor(METHODS, translate)])
        pool: Any = _Pool(source)
        gate: Any = None
        settings, names = PoolSettings(), ModelNames(())
        service = PooledRunnerService(
            pool, settings, names, gate, {}, "auto", Forwarder(), Completions()
        )
        service.add_to(server)
    else:
        server = grpc.aio.server()
        handler: Any = grpc.unary_stream_rpc_method_handler(_clock, pb.CompletionRequest.FromString)
        handlers = grpc.method_handlers_generic_handler(SERVICE_NAME, {"Completion": handler})
        server.add_generic_rpc_handlers((handlers,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(ReadyLine("tcp", f"127.0.0.1:{port}").format(), flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    main()
