"""Several runners in one control group: no runner admitted by the gate is OOM-killed.

Each client is a separate process in the group. The group's limit is set once every client is
ready to load, so that a known number of runners fits and not one more.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runner_client.memory.estimation import MemoryEstimate, estimate
from runner_common.memory.headroom import MINIMUM_VARIABLE
from support.control_group import ControlGroup, control_group, needs_control_group, write_uncached

pytestmark = [pytest.mark.mlx, pytest.mark.timeout(240), needs_control_group]

MIB = 2**20
MINIMUM_BYTES = 64 * MIB
USUAL = {"context_length": 256, "parallel": 12}
SHORT = {"context_length": 64, "parallel": 2, "prefix_cache_bytes": 0}
KEPT = {"prefix_cache_bytes": 96 * MIB}
"""A prefix cache as large as the KV caches of running requests; it fills as these end."""

HEAVY = {
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "intermediate_size": 3072,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
"""The sizes of a model with 166 MiB of weights as float32."""

CLIENT = """
import itertools, json, os, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
import psutil
from runner_client import InsufficientMemoryError, Options, RunnerClient, RunnerProcess
from runner_client.testing import fake_runner

settings = json.loads(sys.argv[1])
runner = RunnerProcess(settings.pop("model"), **settings)
# Allocate the client's own memory before the limit is set.
with fake_runner() as fake, RunnerClient(fake.address) as client:
    client.complete("x")

def next_line():
    return sys.stdin.readline().strip()

numbers = itertools.count()

def fill(_):
    # Distinct prompts that fill the context, by prefill and decode.
    count, number = settings["context_length"], next(numbers)
    prompt = [3 + (number * 7 + at) % 400 for at in range(count - 16)]
    options = Options(num_predict=16, temperature=0, logit_bias={0: -100})
    done = runner.complete(prompt, options=options)
    return done.prompt_eval_count + done.eval_count

def stop_while_it_loads(grown):
    process = psutil.Process(runner.pid)
    begun, deadline = process.memory_info().rss, time.monotonic() + 30
    while process.memory_info().rss < begun + grown:
        assert time.monotonic() < deadline, "the load makes no progress"
        time.sleep(0.0005)
    os.kill(runner.pid, signal.SIGSTOP)

def act(command):
    if command == "load":
        runner.load()
        try:
            runner.wait_until_running()
        except InsufficientMemoryError as error:
            runner.close()
            raise RuntimeError(f"passed the gate and was refused afterwards: {error}") from error
    elif command == "half":
        runner.load()
        stop_while_it_loads(64 << 20)
    elif command == "go on":
        os.kill(runner.pid, signal.SIGCONT)
        runner.wait_until_running()
    elif command == "fill":
        with ThreadPoolExecutor(settings["parallel"]) as pool:
            counts = set(pool.map(fill, range(settings["parallel"])))
        assert counts == {settings["context_length"]}, counts
    elif command == "read twice":
        for _ in range(2):
            with open(next_line(), "rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass
    elif command == "has fallen back":
        model = runner.status().model
        assert model.dtype_fallback and model.dtype == "bfloat16", model
    elif command == "close":
        runner.close()
        assert runner.exit_code == 0, runner.exit_code

print("ready", flush=True)
while command := next_line():
    try:
        act(command)
    except InsufficientMemoryError as error:
        print("refused:", error, flush=True)
    except BaseException as error:
        print("failed:", repr(error), flush=True)
        raise
    else:
        print("done", flush=True)
"""


class Client:
    """A client process in the group, and its runner."""

    def __init__(self, group: ControlGroup, model: Path, **settings: object) -> None:
        whole = {"model": str(model), **USUAL, **settings}
        self.process = subprocess.Popen(
            group.command(sys.executable, "-c", CLIENT, json.dumps(whole)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(sys.path),
                MINIMUM_VARIABLE: str(MINIMUM_BYTES),
            },
        )

    def tell(self, command: str) -> None:
        """Send a command to the client."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        """Read the result of a command."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, command: str) -> str:
        """Send a command to the client and wait for the result."""
        self.tell(command)
        return self.answer()

    def end(self) -> None:
        """End the client, and the runner with the client."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def clients(
    group: ControlGroup, model: Path, count: int, **settings: object
) -> Iterator[list[Client]]:
    """Start clients, ready to load."""
    found = [Client(group, model, **settings) for _ in range(count)]
    try:
        assert [client.answer() for client in found] == ["ready"] * count
        yield found
    finally:
        for client in found:
            client.end()


def need_of(model: Path, **settings: object) -> MemoryEstimate:
    """Return the need of one runner, which also caches the answer for the clients."""
    return estimate(str(model), **(USUAL | settings))  # type: ignore[arg-type]  # checked by estimate


def give_room(group: ControlGroup, need: MemoryEstimate, runners: float) -> None:
    """Limit the group to the memory in use plus the need of ``runners`` runners."""
    group.limit(group.held_bytes + MINIMUM_BYTES + int(runners * need.required_bytes))


def close_all(found: list[Client]) -> None:
    """Close the runners, and check that each exits with 0."""
    assert [client.ask("close") for client in found] == ["done"] * len(found)


@pytest.fixture(scope="module")
def much_kv(model_dir: Callable[..., Path]) -> Path:
    """Build a model with 32 KiB of KV cache per token: 96 MiB for 12 sequences.

    Two wide layers and few sequences take less time than narrow layers and many sequences.
    """
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 256}
    return model_dir(**sizes, **heads)


@pytest.fixture(scope="module")
def heavy(model_dir: Callable[..., Path]) -> Path:
    """Build a model with 166 MiB of weights."""
    return model_dir(**HEAVY)


def test_of_five_clients_two_fit_and_none_is_killed(much_kv: Path) -> None:
    need = need_of(much_kv, **KEPT)
    with (
        control_group() as group,
        clients(group, much_kv, 5, **KEPT) as found,
    ):
        # Library pages count in each runner's need but are shared: some 55 MiB each.
        give_room(group, need, 2.3)
        for client in found:
            client.tell("load")
        answers = [client.answer() for client in found]
        admitted = [
            client for client, answer in zip(found, answers, strict=True) if answer == "done"
        ]
        refused = [answer for answer in answers if answer.startswith("refused:")]
        assert (len(admitted), len(refused)) == (2, 3), answers
        assert all("other runner" in answer for answer in refused)
        for client in admitted:
            client.tell("fill")
        assert [client.answer() for client in admitted] == ["done"] * 2
        assert group.oom_kills == 0
        close_all(admitted)
        # One of the refused clients fits into the memory that they freed.
        waiting = next(client for client in found if client not in admitted)
        assert waiting.ask("load") == "done"
        close_all([waiting])


def test_memory_reserved_by_an_idle_runner_is_not_given_to_others(much_kv: Path) -> None:
    need = need_of(much_kv, **KEPT)
    with (
        control_group() as group,
        clients(group, much_kv, 2, **KEPT) as (first, second),
    ):
        give_room(group, need, 1.7)
        assert first.ask("load") == "done"
        # Memory is free now, but not once the first runner has filled its contexts.
        assert second.ask("load").startswith("refused:")
        assert first.ask("fill") == "done"
        assert second.ask("load").startswith("refused:")
        assert group.oom_kills == 0
        close_all([first])
        assert second.ask("load") == "done"
        assert second.ask("fill") == "done"
        close_all([second])
        assert group.oom_kills == 0


def test_a_second_runner_is_admitted_while_the_first_loads(heavy: Path) -> None:
    """Weights that the first runner has already read are not counted twice."""
    need = need_of(heavy, **SHORT)
    with (
        control_group() as group,
        clients(group, heavy, 2, **SHORT) as (first, second),
    ):
        give_room(group, need, 2.15)
        assert first.ask("half") == "done"
        assert second.ask("load") == "done"
        assert first.ask("go on") == "done"
        for client in (first, second):
            assert client.ask("fill") == "done"
        close_all([first, second])
        assert group.oom_kills == 0


def test_cached_pages_of_a_file_do_not_block_a_runner(heavy: Path, tmp_path: Path) -> None:
    need = need_of(heavy, **SHORT)
    with (
        control_group() as group,
        clients(group, heavy, 1, **SHORT) as (client,),
    ):
        give_room(group, need, 1.3)
        file = write_uncached(tmp_path / "weights", int(1.3 * need.required_bytes))
        client.tell("read twice")
        client.tell(str(file))
        client.tell(str(file))
        assert client.answer() == "done"
        assert client.ask("load") == "done"
        assert client.ask("fill") == "done"
        close_all([client])
        assert group.oom_kills == 0


def test_a_model_falls_back_to_the_stored_format_only_if_allowed(
    model_dir: Callable[..., Path],
) -> None:
    half = model_dir(**HEAVY, dtype="bfloat16")
    need, usual = need_of(half, dtype="as_stored", **SHORT), need_of(half, **SHORT)
    assert usual.required_bytes > 1.3 * need.required_bytes
    with (
        control_group() as group,
        clients(group, half, 1, **SHORT) as (strict,),
        clients(group, half, 1, dtype="auto_or_stored", **SHORT) as (flexible,),
    ):
        give_room(group, need, 1.2)
        refused = strict.ask("load")
        assert refused.startswith("refused:")
        assert '"auto_or_stored"' in refused
        assert flexible.ask("load") == "done"
        assert flexible.ask("has fallen back") == "done"
        assert flexible.ask("fill") == "done"
        close_all([flexible])
        assert group.oom_kills == 0


@pytest.mark.exhaustive
def test_default_prefix_caches_do_not_overcommit(much_kv: Path) -> None:
    """Three runners share the remaining memory for prefix caches and get many prompts each."""
    need = need_of(much_kv)
    assert need.has_default_prefix_cache
    with control_group() as group, clients(group, much_kv, 3) as found:
        give_room(group, need, 3.15)
        assert [client.ask("load") for client in found] == ["done"] * 3
        for _ in range(2):
            for client in found:
                client.tell("fill")
            assert [client.answer() for client in found] == ["done"] * 3
            assert group.oom_kills == 0
        close_all(found)
