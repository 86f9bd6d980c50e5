"""Generate of the gateway's protocol: the answers, and the sampling the engine receives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import pytest

from runner_server.engine.types import Sampling
from runner_server.telemetry.methods import SMG_SERVICE_NAME
from support.fakes import DEADLINE_SECONDS, EOS, VOCAB_SIZE, FakeBackend, says
from support.harness import Server, StartServer, failure
from support.hostile_requests import encode_field

pytest.importorskip("smg_grpc_proto", reason="smg-grpc-proto is not installed (the extra smg)")

from smg_grpc_proto import mlx_engine_pb2 as pb
from smg_grpc_proto import mlx_engine_pb2_grpc

# The stubs have no types for mypy.
Message = Any


class RecordingReply:
    """Reply with a fixed text that records each request's sampling."""

    def __init__(self, text: str = "some text") -> None:
        self.samplings: list[Sampling] = []
        self._says = says(text)

    def __call__(self, prompt_ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """See ``fakes.Reply``."""
        self.samplings.append(sampling)
        return self._says(prompt_ids, sampling)


async def loaded_server(start_server: StartServer, **backend: Any) -> Server:
    server = await start_server(FakeBackend(**backend), smg=True)
    await server.load()
    return server


def start_generate(server: Server, *, stream: bool = False, name: str = "", **sampling: Any) -> Any:
    stub = mlx_engine_pb2_grpc.MlxEngineStub(server.channel)
    request = pb.GenerateRequest(
        request_id=name,
        tokenized=pb.TokenizedInput(input_ids=b"hello"),
        sampling_params=pb.SamplingParams(**sampling),
        stream=stream,
    )
    return stub.Generate(request, timeout=DEADLINE_SECONDS)


async def generate(server: Server, **kwargs: Any) -> list[Message]:
    return [message async for message in start_generate(server, **kwargs)]


async def complete(server: Server, **kwargs: Any) -> Message:
    (message,) = await generate(server, **kwargs)
    return message.complete


async def test_one_message_has_the_whole_answer(start_server: StartServer) -> None:
    server = await loaded_server(start_server, reply=says("hi!"))
    whole = await complete(server)
    assert list(whole.output_ids) == [*b"hi!", EOS]
    assert whole.finish_reason == "stop"
    assert (whole.prompt_tokens, whole.completion_tokens, whole.cached_tokens) == (5, 4, 0)
    assert whole.matched_stop_token_id == EOS
    assert not whole.HasField("output_logprobs")


async def test_a_stream_has_new_tokens_in_each_chunk(start_server: StartServer) -> None:
    server = await loaded_server(start_server, reply=says("a longer text"))
    *chunks, last = [message for message in await generate(server, stream=True)]  # noqa: C416
    counts, seen = [], 0
    for message in chunks:
        seen += len(message.chunk.token_ids)
        counts.append((message.chunk.completion_tokens, message.chunk.prompt_tokens))
        assert counts[-1] == (seen, 5)
    ids = [id_ for message in chunks for id_ in message.chunk.token_ids]
    assert ids == [*b"a longer text", EOS]
    assert not last.complete.output_ids
    assert last.complete.completion_tokens == len(ids)
    assert last.complete.finish_reason == "stop"
    assert last.complete.matched_stop_token_id == EOS


async def test_max_tokens_ends_the_answer(start_server: StartServer) -> None:
    whole = await complete(await loaded_server(start_server), max_tokens=7)
    assert len(whole.output_ids) == whole.completion_tokens == 7
    assert whole.finish_reason == "length"
    assert not whole.HasField("matched_stop_token_id")


async def test_without_max_tokens_the_context_length_ends_the_answer(
    start_server: StartServer,
) -> None:
    server = await start_server(FakeBackend(), smg=True)
    await server.load(context_length=50)
    assert (await complete(server)).completion_tokens == 45


async def test_a_stop_token_ends_the_answer(start_server: StartServer) -> None:
    server = await loaded_server(start_server, reply=says("one, two"))
    whole = await complete(server, stop_token_ids=[ord("!"), ord(",")])
    assert bytes(whole.output_ids) == b"one,"
    assert whole.finish_reason == "stop"
    assert whole.matched_stop_token_id == ord(",")


async def test_the_models_eos_can_be_ignored(start_server: StartServer) -> None:
    def reply(_ids: Sequence[int], _sampling: Sampling) -> Iterator[int]:
        return iter([*b"ab", EOS, *b"cd", ord("."), *b"ef"])

    server = await loaded_server(start_server, reply=reply)
    whole = await complete(server, ignore_eos=True, stop_token_ids=[ord(".")])
    assert list(whole.output_ids) == [*b"ab", EOS, *b"cd", ord(".")]
    assert list((await complete(server)).output_ids) == [*b"ab", EOS]


async def test_omitted_parameters_are_off(start_server: StartServer) -> None:
    asked = RecordingReply()
    await complete(await loaded_server(start_server, reply=asked))
    (sampling,) = asked.samplings
    assert (sampling.temperature, sampling.top_p, sampling.min_p) == (1.0, 1.0, 0.0)
    assert (sampling.top_k, sampling.repeat_penalty) == (0, 1.0)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.0, 0.0)
    assert (sampling.logit_bias, sampling.logprobs) == ((), None)
    assert sampling.counts_output_only


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"temperature": 0.0}, "temperature", 0.0),
        ({"temperature": 0.5}, "temperature", 0.5),
        ({"top_p": 0.25}, "top_p", 0.25),
        ({"top_k": 7}, "top_k", 7),
        ({"min_p": 0.125}, "min_p", 0.125),
        ({"repetition_penalty": 1.5}, "repeat_penalty", 1.5),
        ({"frequency_penalty": -0.5}, "frequency_penalty", -0.5),
        ({"presence_penalty": 0.75}, "presence_penalty", 0.75),
        ({"logit_bias": {3: -100.0}}, "logit_bias", ((3, -100.0),)),
        ({"seed": 0}, "seed", 0),
        ({"seed": -5}, "seed", -5),
        ({"logprobs": 0}, "logprobs", 0),
        ({"logprobs": 20}, "logprobs", 20),
    ],
)
async def test_every_parameter_reaches_the_engine(
    start_server: StartServer, given: dict[str, Any], name: str, value: object
) -> None:
    asked = RecordingReply()
    await complete(await loaded_server(start_server, reply=asked), **given)
    assert getattr(asked.samplings[0], name) == value


async def test_without_a_seed_each_request_gets_its_own(start_server: StartServer) -> None:
    asked = RecordingReply()
    server = await loaded_server(start_server, reply=asked)
    await complete(server)
    await complete(server)
    assert asked.samplings[0].seed != asked.samplings[1].seed


def test_every_field_of_the_protocol_is_known() -> None:
    """Fail when a later version adds a field, to be honoured or refused."""
    known = {
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty",
        "presence_penalty", "logit_bias", "max_tokens", "stop_token_ids", "ignore_eos", "logprobs",
        "seed",
    }  # fmt: skip
    assert {field.name for field in pb.SamplingParams.DESCRIPTOR.fields} == known
    fields = {field.name for field in pb.GenerateRequest.DESCRIPTOR.fields}
    assert fields == {"request_id", "tokenized", "text", "sampling_params", "stream"}


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("temperature", {"temperature": -0.5}),
        ("temperature", {"temperature": float("nan")}),
        ("top_p", {"top_p": 1.5}),
        ("top_p", {"top_p": -0.5}),
        ("top_k", {"top_k": VOCAB_SIZE + 1}),
        ("min_p", {"min_p": 2.0}),
        ("repetition_penalty", {"repetition_penalty": -1.0}),
        ("frequency_penalty", {"frequency_penalty": float("inf")}),
        ("presence_penalty", {"presence_penalty": 1000.0}),
        ("logit_bias[-1]", {"logit_bias": {-1: 1.0}}),
        ("logit_bias[3]", {"logit_bias": {3: 101.0}}),
        ("logit_bias", {"logit_bias": dict.fromkeys(range(1025), 0.0)}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": 2**31}),
        ("stop_token_ids[1]", {"stop_token_ids": [0, VOCAB_SIZE]}),
        ("stop_token_ids", {"stop_token_ids": [0] * 1025}),
        ("logprobs", {"logprobs": -1}),
        ("logprobs", {"logprobs": 21}),
    ],
)
async def test_a_parameter_out_of_range_is_refused_by_name(
    start_server: StartServer, field: str, given: dict[str, Any]
) -> None:
    server = await loaded_server(start_server)
    problem = await failure(start_generate(server, **given))
    assert problem.code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(problem.violations) == [f"sampling_params.{field}"]
    await server.assert_nothing_left()


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("input", {}),
        ("text", {"text": ""}),
        ("tokenized.input_ids", {"tokenized": {}}),
        ("tokenized.input_ids[1]", {"tokenized": {"input_ids": [0, VOCAB_SIZE]}}),
        ("request_id", {"text": "x", "request_id": "x" * 129}),
    ],
)
async def test_an_invalid_prompt_is_refused_by_name(
    start_server: StartServer, field: str, request_: dict[str, Any]
) -> None:
    server = await loaded_server(start_server)
    stub = mlx_engine_pb2_grpc.MlxEngineStub(server.channel)
    problem = await failure(stub.Generate(pb.GenerateRequest(**request_)))
    assert problem.reason == "INVALID_FIELD"
    assert list(problem.violations) == [field]


async def test_a_prompt_longer_than_the_context_is_refused(start_server: StartServer) -> None:
    server = await start_server(FakeBackend(), smg=True)
    await server.load(context_length=5)
    problem = await failure(start_generate(server))
    assert (problem.reason, problem.metadata["promptTokens"]) == ("PROMPT_TOO_LONG", "5")


async def test_text_is_tokenized_as_a_prompt(start_server: StartServer) -> None:
    server = await loaded_server(start_server, reply=says("yes"))
    stub = mlx_engine_pb2_grpc.MlxEngineStub(server.channel)
    answers = [message async for message in stub.Generate(pb.GenerateRequest(text="hello"))]
    # A prompt begins with one special token.
    assert answers[-1].complete.prompt_tokens == 6
    assert bytes(answers[-1].complete.output_ids[:-1]) == b"yes"


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_match_their_tokens(start_server: StartServer, *, stream: bool) -> None:
    server = await loaded_server(start_server, reply=says("abc"))
    messages = await generate(server, stream=stream, logprobs=2)
    parts = [message.chunk if stream else message.complete for message in messages]
    found = [part.output_logprobs for part in parts if part.HasField("output_logprobs")]
    assert [id_ for part in found for id_ in part.token_ids] == [*b"abc", EOS]
    assert [value for part in found for value in part.token_logprobs] == [-0.5] * 4
    tops = [top for part in found for top in part.top_logprobs]
    assert [(list(top.token_ids), list(top.values)) for top in tops] == [([0, 1], [-1.0, -2.0])] * 4


async def test_logprobs_of_zero_omit_the_likeliest_tokens(start_server: StartServer) -> None:
    server = await loaded_server(start_server, reply=says("a"))
    logprobs = (await complete(server, logprobs=0)).output_logprobs
    assert list(logprobs.token_logprobs) == [-0.5, -0.5]
    assert [list(top.token_ids) for top in logprobs.top_logprobs] == [[], []]


async def test_a_full_queue_is_refused_with_a_delay(start_server: StartServer) -> None:
    backend = FakeBackend()
    server = await start_server(backend, smg=True, max_queued=1)
    await server.load(parallel=1)
    backend.step_gate.shut()
    running = [start_generate(server, stream=True, max_tokens=2) for _ in range(2)]
    await server.thread(backend.step_gate.wait_arrival)
    problem = await failure(start_generate(server))
    assert (problem.code, problem.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert problem.retry_seconds
    backend.step_gate.open()
    for call in running:
        assert [message async for message in call][-1].complete.completion_tokens == 2


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("request", encode_field(97, 0, b"\1")),
        ("sampling_params", encode_field(4, 2, encode_field(97, 0, b"\1"))),
        ("tokenized", encode_field(2, 2, encode_field(2, 0, b"\5") + encode_field(97, 0, b"\1"))),
    ],
)
async def test_an_unknown_field_is_refused(
    start_server: StartServer, path: str, data: bytes
) -> None:
    """Refuse unknown fields: a newer gateway would assume they were honoured."""
    server = await loaded_server(start_server)
    generate: Any = server.channel.unary_stream(f"/{SMG_SERVICE_NAME}/Generate")
    problem = await failure(generate(data))
    assert problem.reason == "INVALID_FIELD"
    assert problem.violations.keys() == {path}
    assert "field 97 of " in problem.violations[path]
    await server.assert_nothing_left()


async def test_a_queued_request_gets_headers(start_server: StartServer) -> None:
    backend = FakeBackend()
    server = await start_server(backend, smg=True)
    await server.load(parallel=1)
    backend.step_gate.shut()
    calls = [start_generate(server, max_tokens=1) for _ in range(2)]
    for call in calls:
        await call.initial_metadata()
    assert backend.steps == 0
    backend.step_gate.open()
    for call in calls:
        assert [message async for message in call][-1].complete.completion_tokens == 1
