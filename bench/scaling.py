"""Throughput of one and of two runners, each pinned to one core: ``python -m bench.scaling``.

Measured over HTTP behind the SMG gateway, and over gRPC with client-side load balancing. Each core
stands in for a separate machine. Linux only; ``make gateways`` installs the gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import grpc
import openai

from bench.contenders._environment import environment
from bench.contenders.base import PARALLEL, free_port
from bench.models import ensure_model
from bench.paths import CACHE
from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from runner_common.contract import SERVICE_NAME
from runner_common.handshake import ReadyLine

RUNNERS = 2
PROMPT = "The quick brown fox jumps over the lazy dog and goes on with what it had to do."

_START_SECONDS = 60.0
_SERVICE_CONFIG = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": SERVICE_NAME},
    }
)

Ask = Callable[[int], Awaitable[int]]


def main() -> None:
    """Measure every case and print a table of medians and ranges."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--model", default="llama-100m", help="model of bench.models")
    parser.add_argument("--tokens", type=int, default=48, help="tokens per completion")
    # Enough requests to fill the batches of all runners: half-full batches are less efficient.
    parser.add_argument(
        "--requests", type=int, default=RUNNERS * PARALLEL, help="concurrent requests"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all cases")
    args = parser.parse_args()
    with ExitStack() as stack:
        model = str(ensure_model(args.model))
        cores = [str(core) for core in range(RUNNERS)]
        addresses = [stack.enter_context(_runner(model, core)) for core in cores]
        whole = stack.enter_context(_runner(model, ",".join(cores)))
        ports = {n: stack.enter_context(_gateway(addresses[:n])) for n in (1, RUNNERS)}
        rates = asyncio.run(_measure(args, addresses, whole, ports))
    for name, values in rates.items():
        low, high = min(values), max(values)
        print(f"{name:32} {statistics.median(values):7.0f} tokens/s ({low:.0f} to {high:.0f})")


async def _measure(
    args: argparse.Namespace, addresses: Sequence[str], whole: str, ports: dict[int, int]
) -> dict[str, list[float]]:
    cases = {"gRPC, 1 with all cores": _over_grpc([whole], args.tokens)}
    for count in (1, RUNNERS):
        cases[f"gRPC, {count}"] = _over_grpc(addresses[:count], args.tokens)
        cases[f"gateway, {count}"] = _over_http(ports[count], args.model, args.tokens)
    rates: dict[str, list[float]] = {name: [] for name in cases}
    asked = 0
    for number in range(args.rounds + 1):
        for name, ask in cases.items():
            start = time.monotonic()
            # Every prompt is new: a runner would answer a repeated one from its prefix cache.
            first, asked = asked, asked + args.requests
            counts = await asyncio.gather(*(ask(i) for i in range(first, asked)))
            rate = sum(counts) / (time.monotonic() - start)
            # The first round is the warm-up.
            if number:
                rates[name].append(rate)
    return rates


def _over_grpc(addresses: Sequence[str], tokens: int) -> Ask:
    options = [("grpc.service_config", _SERVICE_CONFIG), ("grpc.enable_http_proxy", 0)]
    channel = grpc.aio.insecure_channel(f"ipv4:{','.join(addresses)}", options)
    stub = runner_pb2_grpc.RunnerServiceStub(channel)

    async def ask(number: int) -> int:
        options = pb.CompletionOptions(num_predict=tokens, seed=number, temperature=1)
        request = pb.CompletionRequest(prompt=f"{number} {PROMPT}", options=options)
        return sum([len(message.token_ids) async for message in stub.Completion(request)])

    return ask


def _over_http(port: int, model: str, tokens: int) -> Ask:
    url = f"http://127.0.0.1:{port}/v1"
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)

    async def ask(number: int) -> int:
        answer = await client.completions.create(
            model=model,
            prompt=f"{number} {PROMPT}",
            max_tokens=tokens,
            seed=number,
            temperature=1,
        )
        return answer.usage.completion_tokens if answer.usage else 0

    return ask


@contextmanager
def _runner(model: str, cores: str) -> Iterator[str]:
    """Start a runner pinned to ``cores``, wait for the model, and yield the address."""
    command = ["taskset", "--cpu-list", cores, sys.executable, "-m", "runner_server", "--smg"]
    command += ["--model", model, "--parallel", str(PARALLEL), "--log-level", "WARNING"]
    process = subprocess.Popen(command, env=environment(), cwd=CACHE, stdout=subprocess.PIPE)
    try:
        line = process.stdout.readline() if process.stdout else b""
        address = ReadyLine.parse(line.decode()).address
        with grpc.insecure_channel(address) as channel:
            stub = runner_pb2_grpc.RunnerServiceStub(channel)
            _until(lambda: stub.Status(pb.StatusRequest()).state == pb.STATE_ACTIVE)
        yield address
    finally:
        process.kill()
        process.wait()


@contextmanager
def _gateway(addresses: Sequence[str]) -> Iterator[int]:
    """Start a gateway in front of the runners and yield the port."""
    port = free_port()
    command = [sys.executable, "-m", "smg", "launch", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--policy", "round_robin", "--log-level", "error"]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    command += ["--worker-urls", *(f"grpc://{address}" for address in addresses)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")

    def answers() -> bool:
        try:
            return bool(client.models.list().data)
        except openai.APIError:
            return False

    try:
        _until(answers)
        yield port
    finally:
        process.kill()
        process.wait()


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + _START_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not ready within {_START_SECONDS:.0f} s")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
