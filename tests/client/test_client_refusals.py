"""Requests refused by the client before anything is sent."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from runner_client import AsyncRunnerClient, InvalidRequestError, Options, RunnerClient

TOO_LARGE = 2**40
LONE_SURROGATE = "\ud800"


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.load(LONE_SURROGATE),
        lambda client: client.load("model", context_length=TOO_LARGE),
        lambda client: client.completion(LONE_SURROGATE),
        lambda client: client.completion([TOO_LARGE]),
        lambda client: client.completion("Hi", logprobs=TOO_LARGE),
        lambda client: client.completion("Hi", options=Options(top_k=TOO_LARGE)),
        lambda client: client.completion("Hi", options=Options(logit_bias={TOO_LARGE: 1.0})),
        lambda client: client.tokenize(LONE_SURROGATE),
        lambda client: client.detokenize([TOO_LARGE]),
    ],
)
def test_values_that_cannot_be_encoded_are_invalid_requests(
    call: Callable[[RunnerClient], object],
) -> None:
    refused = pytest.raises(InvalidRequestError, match="cannot be sent")
    with RunnerClient("127.0.0.1:1") as client, refused:
        call(client)


@pytest.mark.parametrize("address", ["127.0.0.1:65536", "dns:///localhost:99999"])
async def test_a_port_above_65535_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"the port is \d+, but at most 65535"):
        RunnerClient(address)
    with pytest.raises(ValueError, match=r"the port is \d+, but at most 65535"):
        AsyncRunnerClient(address)


def test_a_plain_string_as_stop_is_refused() -> None:
    with pytest.raises(TypeError, match=r"write stop=\('return',\)"):
        Options(stop="return")  # type: ignore[arg-type]  # the mistake under test
