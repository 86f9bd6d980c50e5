"""Requests refused by the client before anything is sent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner_client import (
    AsyncRunnerClient,
    InvalidRequestError,
    LoadOptions,
    MemoryGate,
    Options,
    RestartPolicy,
    RunnerClient,
    RunnerProcess,
    Timeouts,
    TlsFiles,
)
from runner_client.memory.estimation import estimate
from support.fake_child import write_model

TOO_LARGE = 2**40
LONE_SURROGATE = "\ud800"


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.load(LONE_SURROGATE),
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


WRONG_VALUES: dict[str, tuple[Callable[[Any], object], str]] = {
    "size": (
        lambda _: RunnerProcess("m", memory_limit_bytes="8GiB"),  # type: ignore[arg-type]
        r"memory_limit_bytes is a whole number, not '8GiB' \(str\): write memory_limit_bytes=858",
    ),
    "count": (
        lambda _: RunnerProcess("m", parallel="8"),  # type: ignore[arg-type]
        r"parallel is a whole number, not '8' \(str\): write parallel=8",
    ),
    "count of a load": (lambda client: client.load("m", parallel="4"), "write parallel=4"),
    "count of an estimate": (lambda client: client.estimate("m", parallel=4.0), "parallel=4"),
    "truth of a count": (lambda _: LoadOptions(parallel=True), r"not True \(bool\)"),
    "word for a size": (
        lambda _: LoadOptions(prefix_cache_bytes="small"),  # type: ignore[arg-type]
        r"prefix_cache_bytes is a whole number, not 'small' \(str\)$",
    ),
    "truth": (
        lambda _: LoadOptions(allow_inexact="no"),  # type: ignore[arg-type]
        r"allow_inexact is True or False, not 'no' \(str\)",
    ),
    "options of a load": (
        lambda client: client.load("m", options={"parallel": 4}),
        r"options is an object of the class LoadOptions, .*: write options=LoadOptions\(parallel=4",
    ),
    "model of a load": (
        lambda client: client.load(Path("/m")),
        r"model is the path .* as text \(str\), not PosixPath.*: write model='/m'",
    ),
    "model of a process": (lambda _: RunnerProcess(Path("/m")), "write model='/m'"),  # type: ignore[arg-type]
    "variable": (
        lambda _: RunnerProcess("m", env={"OMP_NUM_THREADS": 2}),  # type: ignore[dict-item]
        r"env\['OMP_NUM_THREADS'\] is text \(str\), not 2",
    ),
    "model of an estimate": (lambda _: estimate(5), r"model is .*, not 5 \(int\)"),  # type: ignore[arg-type]
    "prompt": (
        lambda client: client.completion(5),
        r"prompt is text \(str\) or a sequence of token ids, not 5 \(int\)",
    ),
    "no prompt": (lambda client: client.complete(None), r"prompt is text .*, not None"),
    "bytes as prompt": (lambda client: client.complete(b"Hi"), r"prompt is text .*, not b'Hi'"),
    "token id": (lambda client: client.complete([1, "2"]), r"prompt\[1\] is a whole number"),
    "content": (lambda client: client.tokenize(5), r"content is text \(str\), not 5 \(int\)"),
    "bytes": (lambda client: client.tokenize(b"Hi"), "write content='Hi'"),
    "token ids": (lambda client: client.detokenize("12"), "token_ids is a sequence of token ids"),
    "options": (
        lambda client: client.complete("x", options={"num_predict": 3}),
        r"options is an object of the class Options, not a dict: write options=Options\(num_predic",
    ),
    "number of tokens": (lambda _: Options(num_predict="3"), "write num_predict=3"),  # type: ignore[arg-type]
    "temperature": (
        lambda _: Options(temperature="0.5"),  # type: ignore[arg-type]
        r"temperature is a number, not '0.5' \(str\): write temperature=0.5",
    ),
    "stop": (lambda _: Options(stop=(5,)), r"stop\[0\] is text \(str\), not 5"),  # type: ignore[arg-type]
    "no stop": (lambda _: Options(stop=5), "stop is a sequence of strings, not 5"),  # type: ignore[arg-type]
    "biases": (lambda _: Options(logit_bias=[1]), "logit_bias is a mapping from token ids"),  # type: ignore[arg-type]
    "bias": (
        lambda _: Options(logit_bias={1: "2"}),  # type: ignore[dict-item]
        r"logit_bias\[1\] is a number",
    ),
    "biased token": (
        lambda _: Options(logit_bias={"a": 1}),  # type: ignore[dict-item]
        "token id of logit_bias is a whole number",
    ),
    "logprobs": (lambda client: client.complete("x", logprobs="5"), "write logprobs=5"),
    "request id": (lambda client: client.complete("x", request_id=7), r"request_id is text"),
    "trim": (
        lambda client: client.trim(prefix_cache_bytes="1MiB"),
        "write prefix_cache_bytes=1048576",
    ),
    "address": (lambda _: RunnerClient(8080), r"address is text \(str\), not 8080 \(int\)"),  # type: ignore[arg-type]
    "token": (lambda _: RunnerClient("h:1", token=b"t"), "write token='t'"),  # type: ignore[arg-type]
    "certificates": (
        lambda _: RunnerClient("h:1", tls="ca.pem"),  # type: ignore[arg-type]
        r"tls is an object of the class TlsFiles, not 'ca.pem' \(str\)",
    ),
    "timeouts": (lambda _: RunnerClient("h:1", timeouts=5), "timeouts is an object of the class"),  # type: ignore[arg-type]
    "timeout": (lambda _: Timeouts(call_seconds="5"), r"call_seconds is a number, not '5'"),  # type: ignore[arg-type]
    "certificate": (
        lambda _: RunnerClient("h:1", tls=TlsFiles(ca=b"PEM")),  # type: ignore[arg-type]
        "tls.ca is the path of a file, not b'PEM'",
    ),
    "deadline": (lambda client: client.status(timeout_seconds="5"), "write timeout_seconds=5.0"),
    "progress": (lambda client: client.load("m", on_progress=5), "on_progress is a function"),
    "service": (lambda client: client.is_serving(5), r"service is text \(str\), not 5"),
    "environment": (lambda _: RunnerProcess("m", env=["A=1"]), "env is a mapping from names"),  # type: ignore[arg-type]
    "overhead": (lambda _: MemoryGate(overhead_bytes="1GiB"), "write overhead_bytes=1073741824"),  # type: ignore[arg-type]
    "restarts": (lambda _: RestartPolicy(max_restarts="1"), "write max_restarts=1"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("call", "message"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_a_value_of_a_wrong_type_is_refused_by_name(
    call: Callable[[RunnerClient], object], message: str
) -> None:
    with RunnerClient("127.0.0.1:1") as client, pytest.raises(TypeError, match=message):
        call(client)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context_length": 1}, "context_length: 1 is not in the range 2 to 2,147,483,647"),
        ({"context_length": TOO_LARGE}, "context_length: .* is not in the range 2 to"),
        ({"parallel": 0}, "parallel: 0 is not in the range 1 to 256"),
        ({"memory_limit_bytes": 0}, "memory_limit_bytes: 0 is not in the range 1 to"),
        ({"prefix_cache_bytes": -1}, "prefix_cache_bytes: -1 is not in the range 0 to"),
        ({"dtype": "int8"}, "dtype: 'int8' is not one of auto, auto_or_stored, as_stored"),
    ],
)
def test_load_options_out_of_range_are_refused_by_name(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        LoadOptions(**fields)
    assert [field for field, _ in caught.value.field_violations] == list(fields)


def test_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny")
    with pytest.raises(InvalidRequestError, match="backend: 'gpu' is not one of metal, cuda, cpu"):
        estimate(str(model), backend="gpu")  # type: ignore[arg-type]  # the mistake under test


def test_a_negative_overhead_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError, match="overhead_bytes: -1 is not in the range 0 to"):
        MemoryGate(overhead_bytes=-1)


def test_numbers_of_other_libraries_are_accepted() -> None:
    class Whole(float):
        def __index__(self) -> int:
            return int(self)

    options = LoadOptions(parallel=Whole(3))  # type: ignore[arg-type]  # like those of numpy
    assert options.parallel == 3
    assert Options(temperature=1, top_k=Whole(5), stop=["a"])  # type: ignore[arg-type]
