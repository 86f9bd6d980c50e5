"""The keyword ``model`` of the client's calls, which names the model that is meant."""

from __future__ import annotations

import inspect

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import AsyncRunnerClient, RunnerClient, errors
from runner_client.testing import FakeRunner

CALLS = (
    "completion",
    "complete",
    "tokenize",
    "detokenize",
    "status",
    "trim",
    "unload",
    "watch_status",
)


def test_every_request_carries_the_name(client: RunnerClient, runner: FakeRunner) -> None:
    client.complete("Hi", model="fake")
    list(client.completion("Hi", model="fake"))
    client.tokenize("Hi", model="fake")
    client.detokenize([72], model="fake")
    assert client.status(model="fake").model is not None
    with client.watch_status(model="fake") as statuses:
        assert next(statuses).model is not None
    client.trim(model="fake")
    client.unload(model="fake")
    assert [getattr(request, "model", None) for request in runner.requests] == ["fake"] * 7


def test_no_name_is_sent_by_default(client: RunnerClient, runner: FakeRunner) -> None:
    client.tokenize("Hi")
    client.unload()
    assert runner.requests == [pb.TokenizeRequest(content="Hi"), pb.UnloadRequest()]


def test_another_model_is_refused(client: RunnerClient) -> None:
    for call in (
        lambda: client.complete("Hi", model="other"),
        lambda: client.tokenize("Hi", model="other"),
        lambda: client.detokenize([72], model="other"),
        lambda: client.status(model="other"),
        lambda: next(client.watch_status(model="other")),
        lambda: client.trim(model="other"),
        lambda: client.unload(model="other"),
    ):
        with pytest.raises(errors.ModelNotLoadedError, match="'other'") as caught:
            call()
        assert caught.value.model == "other"


def test_a_name_that_is_not_a_text_is_refused(client: RunnerClient) -> None:
    with pytest.raises(TypeError, match="model is the path"):
        client.status(model=7)  # type: ignore[arg-type]  # the test's subject


@pytest.mark.parametrize("name", CALLS)
def test_both_clients_have_the_keyword(name: str) -> None:
    for kind in (RunnerClient, AsyncRunnerClient):
        parameter = inspect.signature(getattr(kind, name)).parameters["model"]
        assert (parameter.default, parameter.kind) == (None, parameter.KEYWORD_ONLY)
