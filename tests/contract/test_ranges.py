"""Every range of the protocol, at its bounds and beyond, over the wire."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.api.validation import load_spec, trim_bytes, watch_interval
from runner_server.config import parse_args
from runner_server.engine.adapters import AdapterSpec
from runner_server.engine.types import Dtype, LoadSpec
from support.fakes import VOCAB_SIZE
from support.harness import Server, failure, tokens

NAN, INF = float("nan"), float("inf")
MAX_INT32, MIN_INT32 = 2**31 - 1, -(2**31)
TINY = 1.4e-45
"""Smallest 32-bit float above 0."""

INSIDE: dict[str, list[Any]] = {
    "temperature": [0, -0.0, TINY, 0.8, 100],
    "top_p": [TINY, 0.5, 1],
    "min_p": [0, -0.0, 0.5, 1],
    "top_k": [0, 1, VOCAB_SIZE],
    "repeat_last_n": [-1, 0, 1, MAX_INT32],
    "repeat_penalty": [0.01, 1, 100],
    "presence_penalty": [-100, -0.0, 100],
    "frequency_penalty": [-100, 0, 100],
    "num_predict": [1, 2, MAX_INT32],
    "seed": [0, -1, 2**63 - 1, -(2**63)],
    "stop": [[], ["x"], ["y" * 1024], [f"s{i}" for i in range(64)], ["日" * 1024]],
    "logit_bias": [
        {},
        {0: 100, VOCAB_SIZE - 1: -100},
        {i % VOCAB_SIZE: 1.0 for i in range(1024)},
        {1: -0.0},
    ],
    "stop_token_ids": [[], [0, VOCAB_SIZE - 1], [300, 300], [300] * 1024],
    "ignore_eos": [False, True],
    "min_predict": [0, 1, 2],
    "penalize_output_only": [False, True],
}

OUTSIDE: dict[str, list[Any]] = {
    "temperature": [-0.001, 100.01, NAN, INF, -INF],
    "top_p": [0, -0.0, -0.1, 1.001, NAN, INF],
    "min_p": [-TINY, 1.001, NAN, INF],
    "top_k": [-1, VOCAB_SIZE + 1, MAX_INT32, MIN_INT32],
    "repeat_last_n": [-2, MIN_INT32],
    "repeat_penalty": [0, -0.0, -1, TINY, 0.0099, 100.01, NAN, INF],
    "presence_penalty": [-100.01, 100.01, NAN, INF, -INF],
    "frequency_penalty": [-100.01, 100.01, NAN, INF, -INF],
    "num_predict": [0, -1, MIN_INT32],
    "stop": [[""], ["ok", ""], ["y" * 1025], ["s"] * 65],
    "logit_bias": [
        {-1: 0.0},
        {VOCAB_SIZE: 0.0},
        {MAX_INT32: 0.0},
        {MIN_INT32: 0.0},
        {1: 100.01},
        {1: -100.01},
        {1: NAN},
        {1: INF},
    ],
    "stop_token_ids": [[-1], [1, VOCAB_SIZE], [MAX_INT32], [MIN_INT32], [1] * 1025],
    "min_predict": [-1, MIN_INT32],
}


def _cases(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(field, value, id=f"{field}-{i}")
        for field, values in table.items()
        for i, value in enumerate(values)
    ]


def test_every_option_has_cases() -> None:
    fields = {field.name for field in pb.CompletionOptions.DESCRIPTOR.fields}
    assert set(INSIDE) == fields
    assert set(OUTSIDE) == fields - {"seed", "ignore_eos", "penalize_output_only"}


@pytest.mark.parametrize(("field", "value"), _cases(INSIDE))
async def test_an_option_in_range_is_accepted(loaded: Server, field: str, value: object) -> None:
    options: dict[str, Any] = {"num_predict": 2, field: value}
    if field == "num_predict":
        loaded.backend.reply = lambda _ids, _sampling: iter([65, 256])
    messages = await loaded.complete(**options)
    assert messages[-1].done
    assert len(tokens(messages)) == messages[-1].eval_count


@pytest.mark.parametrize(("field", "value"), _cases(OUTSIDE))
async def test_an_option_out_of_range_is_refused(loaded: Server, field: str, value: Any) -> None:
    problem = await failure(loaded.start(**{field: value}))
    assert (problem.code, problem.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert problem.violations
    assert all(name.startswith(f"options.{field}") for name in problem.violations)
    assert all(problem.violations.values())
    assert loaded.backend.steps == 0


@pytest.mark.parametrize("count", [0, 1, 20])
async def test_logprobs_in_range_are_accepted(loaded: Server, count: int) -> None:
    messages = await loaded.complete(logprobs=count, num_predict=1)
    assert len(messages[-1].logprobs[0].top) == count


@pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("count", [-1, 21, MAX_INT32])
async def test_logprobs_out_of_range_are_refused(loaded: Server, count: int, field: str) -> None:
    fields: dict[str, Any] = {field: count}
    assert set((await failure(loaded.start(**fields))).violations) == {field}


@pytest.mark.parametrize("ids", [[0], [VOCAB_SIZE - 1, 3, 3], [5] * 128])
async def test_ids_for_log_probabilities_in_range_are_accepted(
    loaded: Server, ids: list[int]
) -> None:
    messages = await loaded.complete(logprob_token_ids=ids, num_predict=1)
    entry = messages[-1].logprobs[0]
    assert [candidate.token_id for candidate in entry.candidates] == ids
    assert not entry.top


@pytest.mark.parametrize("ids", [[-1], [1, VOCAB_SIZE], [MAX_INT32], [MIN_INT32], [1] * 129])
async def test_ids_for_log_probabilities_out_of_range_are_refused(
    loaded: Server, ids: list[int]
) -> None:
    (field,) = (await failure(loaded.start(logprob_token_ids=ids))).violations
    assert field.startswith("logprob_token_ids")


BAD_INPUTS: list[tuple[pb.CompletionRequest, str]] = [
    (pb.CompletionRequest(), "input"),
    (pb.CompletionRequest(prompt=""), "prompt"),
    (pb.CompletionRequest(prompt_token_ids=pb.TokenIds()), "prompt_token_ids"),
    (
        pb.CompletionRequest(prompt_token_ids=pb.TokenIds(ids=[1, -1])),
        "prompt_token_ids.ids[1]",
    ),
    (
        pb.CompletionRequest(prompt_token_ids=pb.TokenIds(ids=[VOCAB_SIZE])),
        "prompt_token_ids.ids[0]",
    ),
    (
        pb.CompletionRequest(prompt_token_ids=pb.TokenIds(ids=[1, 2, 10**9])),
        "prompt_token_ids.ids[2]",
    ),
    (pb.CompletionRequest(prompt="x", request_id="r" * 129), "request_id"),
    (pb.CompletionRequest(prompt="x", cache_salt="s" * 129), "cache_salt"),
    (pb.CompletionRequest(prompt_token_ids=pb.TokenIds(ids=[1]), literal=True), "literal"),
]


@pytest.mark.parametrize(("request_", "field"), BAD_INPUTS)
async def test_an_invalid_input_is_refused_by_name(
    loaded: Server, request_: pb.CompletionRequest, field: str
) -> None:
    problem = await failure(loaded.stub.Completion(request_))
    assert problem.reason == "INVALID_FIELD"
    assert set(problem.violations) == {field}


async def test_one_answer_names_every_violation(loaded: Server) -> None:
    request = pb.CompletionRequest(
        logprobs=50,
        request_id="r" * 200,
        options=pb.CompletionOptions(top_p=7, num_predict=0),
    )
    problem = await failure(loaded.stub.Completion(request))
    expected = {"input", "options.top_p", "options.num_predict", "logprobs", "request_id"}
    assert all(name in problem.message for name in expected)
    assert set(problem.violations) <= expected
    assert len(problem.violations) >= 4


async def test_the_longest_request_id_and_salt_are_accepted(loaded: Server) -> None:
    options = pb.CompletionOptions(num_predict=1)
    request = pb.CompletionRequest(
        prompt="x", request_id="r" * 128, cache_salt="s" * 128, options=options
    )
    assert [m async for m in loaded.stub.Completion(request)][-1].done


@pytest.mark.parametrize("ids", [[-1], [VOCAB_SIZE], [0, MAX_INT32]])
async def test_token_ids_out_of_range_are_refused(loaded: Server, ids: list[int]) -> None:
    call = loaded.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))
    assert set((await failure(call)).violations) == {f"token_ids[{len(ids) - 1}]"}


LOAD_INSIDE: list[tuple[dict[str, Any], LoadSpec]] = [
    ({}, LoadSpec("m")),
    ({"context_length": 2, "parallel": 1}, LoadSpec("m", context_length=2, parallel=1)),
    (
        {"context_length": MAX_INT32, "parallel": 256},
        LoadSpec("m", context_length=MAX_INT32, parallel=256),
    ),
    ({"memory_limit_bytes": 1}, LoadSpec("m", memory_limit_bytes=1)),
    ({"memory_limit_bytes": 2**63 - 1}, LoadSpec("m", memory_limit_bytes=2**63 - 1)),
    ({"prefix_cache_bytes": 0}, LoadSpec("m", prefix_cache_bytes=0)),
    ({"prefix_cache_bytes": 2**63 - 1}, LoadSpec("m", prefix_cache_bytes=2**63 - 1)),
    ({"dtype": pb.DTYPE_UNSPECIFIED}, LoadSpec("m", dtype=Dtype.AUTO)),
    ({"dtype": pb.DTYPE_FLOAT16}, LoadSpec("m", dtype=Dtype.FLOAT16)),
    ({"dtype": pb.DTYPE_AUTO_OR_STORED}, LoadSpec("m", dtype=Dtype.AUTO_OR_STORED)),
    ({"memory_override": True}, LoadSpec("m", memory_override=True)),
    ({"memory_override": False}, LoadSpec("m")),
    ({"allow_inexact": True}, LoadSpec("m", allow_inexact=True)),
    ({"kv_bits": 0}, LoadSpec("m")),
    ({"kv_bits": 4}, LoadSpec("m", kv_bits=4)),
    ({"kv_bits": 8}, LoadSpec("m", kv_bits=8)),
    (
        {"adapters": [pb.Adapter(name="n" * 128, path="p"), pb.Adapter(name="b", path="p" * 4096)]},
        LoadSpec("m", adapters=(AdapterSpec("n" * 128, "p"), AdapterSpec("b", "p" * 4096))),
    ),
]


@pytest.mark.parametrize(("fields", "spec"), LOAD_INSIDE)
def test_a_load_in_range_is_accepted(fields: dict[str, Any], spec: LoadSpec) -> None:
    assert load_spec(pb.LoadRequest(model="m", **fields)) == spec


def test_every_dtype_is_known() -> None:
    for number in pb.Dtype.values():
        assert load_spec(pb.LoadRequest(model="m", dtype=number))


LOAD_OUTSIDE: list[tuple[str, Callable[[], pb.LoadRequest]]] = [
    ("model", pb.LoadRequest),
    ("model", lambda: pb.LoadRequest(model="m" * 4097)),
    ("model", lambda: pb.LoadRequest(model="a\0b")),
    ("context_length", lambda: pb.LoadRequest(model="m", context_length=1)),
    ("context_length", lambda: pb.LoadRequest(model="m", context_length=MIN_INT32)),
    ("parallel", lambda: pb.LoadRequest(model="m", parallel=0)),
    ("kv_bits", lambda: pb.LoadRequest(model="m", kv_bits=-4)),
    ("kv_bits", lambda: pb.LoadRequest(model="m", kv_bits=6)),
    ("parallel", lambda: pb.LoadRequest(model="m", parallel=257)),
    ("memory_limit_bytes", lambda: pb.LoadRequest(model="m", memory_limit_bytes=0)),
    ("memory_limit_bytes", lambda: pb.LoadRequest(model="m", memory_limit_bytes=-1)),
    ("prefix_cache_bytes", lambda: pb.LoadRequest(model="m", prefix_cache_bytes=-1)),
    ("prefix_cache_bytes", lambda: pb.LoadRequest(model="m", prefix_cache_bytes=-(2**63))),
    ("dtype", lambda: pb.LoadRequest(model="m", dtype=99)),  # type: ignore[arg-type]  # unknown
    ("adapters", lambda: _adapters(*((str(i), "p") for i in range(65)))),
    ("adapters[0].name", lambda: _adapters(("", "p"))),
    ("adapters[0].name", lambda: _adapters(("n" * 129, "p"))),
    ("adapters[1].name", lambda: _adapters(("a", "p"), ("a", "q"))),
    ("adapters[1].path", lambda: _adapters(("a", "p"), ("b", ""))),
    ("adapters[0].path", lambda: _adapters(("a", "p" * 4097))),
    ("adapters[0].path", lambda: _adapters(("a", "p\0q"))),
]


def _adapters(*adapters: tuple[str, str]) -> pb.LoadRequest:
    adapted = [pb.Adapter(name=name, path=path) for name, path in adapters]
    return pb.LoadRequest(model="m", adapters=adapted)


@pytest.mark.parametrize("size", [0, 2**63 - 1])
def test_a_prefix_cache_size_on_the_command_line_is_accepted(size: int) -> None:
    config = parse_args(["--model", "m", "--prefix-cache-bytes", str(size)])
    assert config.load == LoadSpec("m", prefix_cache_bytes=size)


@pytest.mark.parametrize("size", ["-1", str(2**63), "8 apples"])
def test_a_wrong_prefix_cache_size_on_the_command_line_is_refused(
    size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--model", "m", "--prefix-cache-bytes", size])
    assert "--prefix-cache-bytes" in capsys.readouterr().err


def test_adapters_on_the_command_line_are_accepted() -> None:
    config = parse_args(["--model", "m", "--adapter", "a=/x", "--adapter", "b=/y=z"])
    adapters = (AdapterSpec("a", "/x"), AdapterSpec("b", "/y=z"))
    assert config.load == LoadSpec("m", adapters=adapters)


@pytest.mark.parametrize(
    ("adapters", "problem"),
    [
        (["/x"], "'/x': expected NAME=DIR"),
        (["a=/x", "a=/y"], "two adapters have the same name"),
        ([f"{i}=/x" for i in range(65)], "65; at most 64"),
    ],
)
def test_wrong_adapters_on_the_command_line_are_refused(
    adapters: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--model", "m", *(part for each in adapters for part in ("--adapter", each))])
    assert f"argument --adapter: {problem}" in capsys.readouterr().err


def test_an_adapter_on_the_command_line_needs_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--adapter", "a=/x"])
    assert "--adapter needs --model" in capsys.readouterr().err


@pytest.mark.parametrize(("field", "make"), LOAD_OUTSIDE)
async def test_a_load_out_of_range_is_refused(
    loaded: Server, field: str, make: Callable[[], pb.LoadRequest]
) -> None:
    problem = await failure(loaded.stub.Load(make()))
    assert (problem.code, problem.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert set(problem.violations) == {field}
    # A refused load keeps the loaded model.
    assert (await loaded.status()).model.name == "fake"


def _as_estimate(request: pb.LoadRequest) -> pb.EstimateRequest:
    """Copy the fields, whose numbers are the same in both messages."""
    return pb.EstimateRequest.FromString(request.SerializeToString())


def test_an_estimate_has_the_fields_of_a_load() -> None:
    load = {field.name: field.number for field in pb.LoadRequest.DESCRIPTOR.fields}
    estimate = {field.name: field.number for field in pb.EstimateRequest.DESCRIPTOR.fields}
    assert load == {**estimate, "memory_override": load["memory_override"]}


@pytest.mark.parametrize(("fields", "spec"), LOAD_INSIDE)
def test_an_estimate_in_range_is_accepted(fields: dict[str, Any], spec: LoadSpec) -> None:
    load = pb.LoadRequest(model="m", **fields)
    load.ClearField("memory_override")
    assert load_spec(_as_estimate(load)) == replace(spec, memory_override=False)


@pytest.mark.parametrize(("field", "make"), LOAD_OUTSIDE)
async def test_an_estimate_out_of_range_is_refused(
    loaded: Server, field: str, make: Callable[[], pb.LoadRequest]
) -> None:
    problem = await failure(loaded.stub.Estimate(_as_estimate(make())))
    assert (problem.code, problem.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert set(problem.violations) == {field}


@pytest.mark.parametrize(("seconds", "nanos"), [(0, 100_000_000), (1, 999_999_999), (3600, 0)])
def test_an_interval_in_range_is_accepted(seconds: int, nanos: int) -> None:
    request = pb.WatchStatusRequest(interval=Duration(seconds=seconds, nanos=nanos))
    assert watch_interval(request) == pytest.approx(seconds + nanos / 1e9)


def test_an_interval_may_be_unset() -> None:
    assert watch_interval(pb.WatchStatusRequest()) is None


@pytest.mark.parametrize(
    ("seconds", "nanos"),
    [(0, 0), (0, 99_999_999), (3600, 1), (-1, 0), (1, -1), (1, 10**9), (2**63 - 1, MAX_INT32)],
)
async def test_an_interval_out_of_range_is_refused(
    server: Server, seconds: int, nanos: int
) -> None:
    request = pb.WatchStatusRequest(interval=Duration(seconds=seconds, nanos=nanos))
    problem = await failure(server.stub.WatchStatus(request))
    assert (problem.code, problem.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert set(problem.violations) == {"interval"}


@pytest.mark.parametrize(("size", "kept"), [(None, 0), (0, 0), (1, 1), (2**63 - 1, 2**63 - 1)])
def test_a_trim_in_range_is_accepted(size: int | None, kept: int) -> None:
    assert trim_bytes(pb.TrimRequest(prefix_cache_bytes=size)) == kept


@pytest.mark.parametrize("size", [-1, -(2**63)])
async def test_a_trim_out_of_range_is_refused(loaded: Server, size: int) -> None:
    problem = await failure(loaded.stub.Trim(pb.TrimRequest(prefix_cache_bytes=size)))
    assert (problem.code, problem.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert set(problem.violations) == {"prefix_cache_bytes"}
