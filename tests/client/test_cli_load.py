"""Commands that change or use the model of a running runner: load, unload and run --address."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client.testing import Failure, fake_runner
from support.command_line import invoke

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runner_client.testing import FakeRunner

MIB = 2**20


@pytest.fixture
def fake() -> Iterator[FakeRunner]:
    with fake_runner(pieces=("Hello", " wörld")) as runner:
        yield runner


def test_load_shows_progress_and_the_model(fake: FakeRunner) -> None:
    result = invoke("load", fake.address, "org/name")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[0] == "loading org/name"
    assert result.stdout.startswith("model  org/name (")
    assert fake.model == "org/name"


def test_load_as_json_is_one_object(fake: FakeRunner) -> None:
    record = json.loads(invoke("load", fake.address, "org/name", "--json").stdout)
    assert record["model"]["name"] == "org/name"
    assert record["load_seconds"] >= 0


def test_every_load_option_reaches_the_runner(fake: FakeRunner) -> None:
    result = invoke(
        *("load", fake.address, "org/name", "--context-length", "99", "--parallel", "2"),
        *("--dtype", "bfloat16", "--memory-limit", "8MiB", "--prefix-cache", "1MiB"),
        *("--memory-override", "--allow-inexact", "--kv-bits", "8"),
        *("--draft-model", "org/draft"),
        *("--adapter", "sql=/adapters/sql", "--adapter", "a=b=c"),
    )
    assert result.exit_code == 0, result.output
    assert fake.requests == [
        pb.LoadRequest(
            model="org/name",
            context_length=99,
            parallel=2,
            dtype=pb.DTYPE_BFLOAT16,
            memory_limit_bytes=8 * MIB,
            prefix_cache_bytes=MIB,
            memory_override=True,
            allow_inexact=True,
            kv_bits=8,
            draft_model="org/draft",
            adapters=[
                pb.Adapter(name="sql", path="/adapters/sql"),
                pb.Adapter(name="a", path="b=c"),
            ],
        )
    ]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (["sql"], "'sql': expected NAME=DIR"),
        (["=x"], "'=x': expected NAME=DIR"),
        (["a=x", "a=y"], "--adapter: two adapters have the same name"),
    ],
)
def test_an_adapter_needs_a_name_of_its_own(
    fake: FakeRunner, values: list[str], problem: str
) -> None:
    options = [part for value in values for part in ("--adapter", value)]
    result = invoke("load", fake.address, "org/name", *options)
    assert result.exit_code == 2
    assert problem in result.stderr
    assert fake.requests == []


def test_a_refused_adapter_is_named_as_an_option(fake: FakeRunner) -> None:
    violations = [("adapters[0].path", "'b' is not a directory")]
    text = "adapters[0].path: 'b' is not a directory"
    fake.failure = Failure("INVALID_FIELD", text, field_violations=violations)
    result = invoke("load", fake.address, "org/name", "--adapter", "a=b")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, f"error: {text}")


def test_a_model_that_does_not_fit_exits_with_3(fake: FakeRunner) -> None:
    fake.available_bytes = 1
    result = invoke("load", fake.address, "org/name")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.endswith("error: the model does not fit\n")
    assert invoke("load", fake.address, "org/name", "--memory-override").exit_code == 0


def test_a_refused_option_is_named_as_an_option(fake: FakeRunner) -> None:
    fake.failure = Failure(
        "INVALID_FIELD",
        "context_length: 99 is too much",
        field_violations=[("context_length", "99 is too much")],
    )
    result = invoke("load", fake.address, "org/name", "--context-length", "99")
    assert result.exit_code == 2
    assert result.stderr.endswith("error: --context-length: 99 is too much\n")


def test_unload_frees_the_model(fake: FakeRunner) -> None:
    result = invoke("unload", fake.address)
    assert (result.exit_code, result.stdout) == (0, "0 B freed\n")
    assert fake.model is None
    assert json.loads(invoke("unload", fake.address, "--json").stdout) == {"freed_bytes": 0}


def test_run_asks_a_running_runner(fake: FakeRunner) -> None:
    result = invoke("run", "--address", fake.address, "Hi", "--top-k", "5")
    assert result.exit_code == 0, result.output
    assert result.stdout == "Hello wörld\n"
    assert "generated  2 tokens, ended by stop" in result.stderr
    (request,) = fake.requests
    assert isinstance(request, pb.CompletionRequest)
    assert (request.prompt, request.options.top_k) == ("Hi", 5)


def test_run_asks_a_running_runner_with_standard_input_and_json(fake: FakeRunner) -> None:
    result = invoke("run", "--address", fake.address, "-", "--json", given="Hi")
    record = json.loads(result.stdout)
    assert (record["content"], record["done_reason"]) == ("Hello wörld", "stop")
    assert "load_seconds" not in record


def test_run_reports_a_runner_without_a_model(fake: FakeRunner) -> None:
    fake.model = None
    result = invoke("run", "--address", fake.address, "Hi")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: no model is loaded\n"
