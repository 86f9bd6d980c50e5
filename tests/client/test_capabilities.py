"""The capabilities of a model in the client."""

from __future__ import annotations

from dataclasses import fields

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import Capabilities, RunnerClient
from runner_client.cli.status import status_rows
from runner_client.rpc.messages.responses import status
from runner_client.testing import fake_runner
from runner_common.contract import MAX_LOGPROBS


def test_the_fields_are_those_of_the_protocol() -> None:
    names = [field.name for field in pb.Capabilities.DESCRIPTOR.fields]
    assert [field.name for field in fields(Capabilities)] == names


def test_what_an_older_server_does_not_tell_is_unknown() -> None:
    older = status(pb.StatusResponse(model=pb.Model(name="m")))
    assert older.model
    assert older.model.capabilities == Capabilities()
    assert "requests" not in dict(status_rows(older))


def test_false_and_zero_are_known() -> None:
    message = pb.Capabilities(batched=False, max_stop_count=0)
    newer = status(pb.StatusResponse(model=pb.Model(capabilities=message)))
    assert newer.model
    assert newer.model.capabilities == Capabilities(batched=False, max_stop_count=0)
    assert dict(status_rows(newer))["requests"] == "one after another, up to 0 stop strings"


def test_the_fake_runner_tells_its_own() -> None:
    with fake_runner() as runner, RunnerClient(runner.address) as client:
        model = client.status().model
        assert model
        assert (model.capabilities.batched, model.capabilities.prefix_cache) == (True, False)
        assert model.capabilities.max_logprobs == MAX_LOGPROBS
        assert client.load("m").model.capabilities == model.capabilities
