"""Requests known from attackers and broken clients, sent to a server with MLX.

Several of them bring other servers down: a segfault for a token id out of range, a thread killed
by an empty prompt, a batch that fails because of one row's `top_k`.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from hostile.conftest import CONTEXT_LENGTH, DEMO
from mlxrunner.v1 import runner_pb2 as pb
from support.call_outcomes import Caller
from support.harness import Server, failure
from support.hostile_requests import INVALID_UTF8, METHODS, TEXTS, encode_field, encode_varint

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
pytestmark = [pytest.mark.mlx, pytest.mark.asyncio(loop_scope="module")]

MEGABYTE = 10**6
BILLION = 10**9


async def outcome(target: Server, request: Message) -> str:
    """Return the outcome of a call with this request; the rpc follows from the type."""
    name = request.DESCRIPTOR.name.removesuffix("Request")
    return await Caller(target.channel).send((name, request.SerializeToString()))


def completion(prompt: str = "def", **options: Any) -> pb.CompletionRequest:
    """Return a request for a few tokens."""
    chosen: dict[str, Any] = {"num_predict": 4} | options
    return pb.CompletionRequest(prompt=prompt, options=pb.CompletionOptions(**chosen))


async def test_empty_prompts_are_refused(target: Server) -> None:
    empty = pb.CompletionRequest(prompt_token_ids=pb.TokenIds())
    for request in (completion(""), empty, pb.CompletionRequest()):
        assert await outcome(target, request) == "INVALID_FIELD"
    assert await outcome(target, pb.TokenizeRequest()) == "OK"
    assert await outcome(target, pb.DetokenizeRequest()) == "OK"


@pytest.mark.parametrize("unit", ["x", " ", "\0", "😀", "\u202eש", "def f(x):\n", "<|end|>"])
async def test_a_prompt_of_ten_megabytes_is_too_long(target: Server, unit: str) -> None:
    """Refuse from the beginning alone: the whole text would take six seconds and two gigabytes."""
    problem = await failure(target.start(unit * (10 * MEGABYTE // len(unit.encode()))))
    assert problem.reason == "PROMPT_TOO_LONG"
    # A lower bound from the beginning, not the millions of the whole text.
    assert CONTEXT_LENGTH < int(problem.metadata["promptTokens"]) < MEGABYTE / 2


async def test_ten_megabytes_in_any_text_are_refused(target: Server) -> None:
    text = "x" * (10 * MEGABYTE)
    requests: list[Message] = [
        pb.LoadRequest(model=text),
        pb.EstimateRequest(model=text),
        pb.CompletionRequest(prompt="x", request_id=text),
        completion(stop=[text]),
        pb.TokenizeRequest(content=text),
    ]
    outcomes = [await outcome(target, request) for request in requests]
    assert outcomes == ["INVALID_FIELD"] * len(requests)


async def test_special_tokens_are_accepted_anywhere(target: Server) -> None:
    texts = ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>"]
    assert await outcome(target, completion("".join(texts))) == "OK"
    assert await outcome(target, completion(texts[0] * (CONTEXT_LENGTH - 1))) == "OK"
    ids = pb.TokenIds(ids=list(range(len(texts))) * 3)
    options = pb.CompletionOptions(num_predict=4)
    request = pb.CompletionRequest(prompt_token_ids=ids, options=options, logprobs=20)
    assert await outcome(target, request) == "OK"
    assert await outcome(target, completion(stop=texts, logit_bias={0: 100.0})) == "OK"


@pytest.mark.parametrize("id_", [-1, 2048, MEGABYTE, BILLION, 2**31 - 1, -(2**31)])
async def test_token_ids_outside_the_vocabulary_are_refused(target: Server, id_: int) -> None:
    requests: list[Message] = [
        pb.CompletionRequest(prompt_token_ids=pb.TokenIds(ids=[5, id_])),
        pb.DetokenizeRequest(token_ids=[5, id_]),
        completion(logit_bias={id_: 1.0}),
    ]
    outcomes = [await outcome(target, request) for request in requests]
    assert outcomes == ["INVALID_FIELD"] * len(requests)


def _texts(descriptor: Descriptor, data: bytes) -> Iterator[bytes]:
    """Yield one message for each string field of the type, holding ``data``."""
    for field in descriptor.fields:
        if field.type == FieldDescriptor.TYPE_STRING:
            yield encode_field(field.number, 2, data)
        elif field.message_type and not field.message_type.GetOptions().map_entry:
            inside = _texts(field.message_type, data)
            yield from (encode_field(field.number, 2, message) for message in inside)


@pytest.mark.parametrize("data", INVALID_UTF8)
async def test_lone_surrogates_and_other_invalid_utf8_are_refused(
    target: Server, data: bytes
) -> None:
    caller, refused = Caller(target.channel), set[str]()
    for method in METHODS:
        for request in _texts(method.input_type, data):
            assert await caller.send((method.name, request)) == "INVALID_FIELD"
            refused.add(method.name)
    assert refused >= {"Load", "Estimate", "Completion", "Tokenize", "Status", "Unload"}


async def test_odd_characters_survive_tokenizing(target: Server) -> None:
    for text in TEXTS:
        answer = await target.stub.Tokenize(pb.TokenizeRequest(content=text))
        request = pb.DetokenizeRequest(token_ids=answer.token_ids)
        assert (await target.stub.Detokenize(request)).content == text


async def test_odd_characters_are_accepted_in_every_text(target: Server) -> None:
    texts = [text for text in TEXTS if 0 < len(text) < 30]
    assert len(texts) > 8
    requests: list[Message] = []
    for text in texts:
        requests += [completion(text), completion(stop=[text]), completion()]
        requests[-1].MergeFrom(pb.CompletionRequest(request_id=text))
    outcomes = await asyncio.gather(*(outcome(target, request) for request in requests))
    assert outcomes == ["OK"] * len(requests)


async def test_a_hundred_thousand_stop_strings_are_refused(target: Server) -> None:
    request = completion(stop=[f"stop {i}" for i in range(100_000)])
    assert await outcome(target, request) == "INVALID_FIELD"
    longest = completion(stop=["a" * 1023 + chr(0x4E00 + i) for i in range(64)])
    assert await outcome(target, longest) == "OK"


async def test_a_stop_string_of_a_megabyte_is_refused(target: Server) -> None:
    assert await outcome(target, completion(stop=["s" * MEGABYTE])) == "INVALID_FIELD"


FLOATS = [
    field.name
    for field in pb.CompletionOptions.DESCRIPTOR.fields
    if field.type == FieldDescriptor.TYPE_FLOAT
]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
async def test_nan_and_infinity_are_refused_in_every_float(target: Server, value: float) -> None:
    assert len(FLOATS) == 6
    for field in FLOATS:
        options: dict[str, Any] = {field: value}
        assert await outcome(target, completion(**options)) == "INVALID_FIELD"
    assert await outcome(target, completion(logit_bias={5: value})) == "INVALID_FIELD"
    # A NaN with other bits.
    signalling = struct.pack("<I", 0x7F800001)
    for field in FLOATS:
        number = pb.CompletionOptions.DESCRIPTOR.fields_by_name[field].number
        part = encode_field(3, 2, encode_field(number, 5, signalling))
        data = completion().SerializeToString() + part
        assert await Caller(target.channel).send(("Completion", data)) == "INVALID_FIELD"


BILLION_ENDINGS = {
    "options.num_predict": "OK",
    "options.repeat_last_n": "OK",
    "options.seed": "OK",
    "options.top_k": "INVALID_FIELD",
    "options.stop_token_ids": "INVALID_FIELD",
    "options.min_predict": "INVALID_FIELD",
    "logprobs": "INVALID_FIELD",
    "logprob_token_ids": "INVALID_FIELD",
    "prompt_logprobs": "INVALID_FIELD",
    "priority": "INVALID_FIELD",
}


def _numbers(message: Message) -> set[str]:
    return {
        field.name
        for field in message.DESCRIPTOR.fields
        if field.type in (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64)
    }


async def test_a_billion_in_any_number_of_a_completion_does_no_harm(target: Server) -> None:
    in_options = {f"options.{name}" for name in _numbers(pb.CompletionOptions())}
    assert in_options | _numbers(pb.CompletionRequest()) == BILLION_ENDINGS.keys()
    for field, expected in BILLION_ENDINGS.items():
        request = completion()
        part: Any = request.options if "." in field else request
        name = field.removeprefix("options.")
        if part.DESCRIPTOR.fields_by_name[name].is_repeated:
            getattr(part, name).append(BILLION)
        else:
            setattr(part, name, BILLION)
        assert await outcome(target, request) == expected, field


LOAD_BILLION_ENDINGS = {
    "context_length": "INVALID_FIELD",
    "parallel": "INVALID_FIELD",
    "dtype": "INVALID_FIELD",
    "memory_limit_bytes": "OK",
    "prefix_cache_bytes": "OK",
    "kv_bits": "INVALID_FIELD",
}


async def test_a_billion_in_any_number_of_a_load_does_no_harm(real: Server) -> None:
    assert {*_numbers(pb.LoadRequest()), "dtype"} == LOAD_BILLION_ENDINGS.keys()
    caller = Caller(real.channel)
    for field, expected in LOAD_BILLION_ENDINGS.items():
        number = pb.LoadRequest.DESCRIPTOR.fields_by_name[field].number
        data = pb.LoadRequest(model=str(DEMO)).SerializeToString()
        call = ("Load", data + encode_field(number, 0, encode_varint(BILLION)))
        assert await caller.send(call) == expected, field
    await real.load(str(DEMO), context_length=CONTEXT_LENGTH)


async def test_a_billion_in_any_number_of_an_estimate_does_no_harm(target: Server) -> None:
    assert {*_numbers(pb.EstimateRequest()), "dtype"} == LOAD_BILLION_ENDINGS.keys()
    for field, expected in LOAD_BILLION_ENDINGS.items():
        number = pb.EstimateRequest.DESCRIPTOR.fields_by_name[field].number
        data = pb.EstimateRequest(model=str(DEMO)).SerializeToString()
        call = ("Estimate", data + encode_field(number, 0, encode_varint(BILLION)))
        assert await Caller(target.channel).send(call) == expected, field


async def test_a_trim_to_a_negative_size_is_refused(target: Server) -> None:
    for size in (BILLION, 2**63 - 1):
        assert await outcome(target, pb.TrimRequest(prefix_cache_bytes=size)) == "OK"
    assert await outcome(target, pb.TrimRequest(prefix_cache_bytes=-BILLION)) == "INVALID_FIELD"


async def test_allowed_extremes_together_do_no_harm(target: Server) -> None:
    """Send values in range at once; none may raise in a shared step."""
    tiny, huge = 1.4e-45, 100.0
    cases: list[dict[str, Any]] = [
        {"temperature": tiny, "top_p": tiny, "min_p": 1.0, "top_k": 1},
        {"temperature": huge, "top_p": 1.0, "min_p": 0.0, "top_k": 2048},
        {"repeat_penalty": 100.0, "presence_penalty": -huge, "frequency_penalty": huge},
        {"repeat_penalty": 0.01, "presence_penalty": huge, "frequency_penalty": -huge},
        {"repeat_last_n": 2**31 - 1, "repeat_penalty": 2.0, "seed": -(2**63)},
        {"logit_bias": dict.fromkeys(range(1024), -huge), "seed": 2**63 - 1},
        {"logit_bias": {0: huge, 2047: -huge}, "temperature": 0.0},
    ]
    requests = [completion("def f(", num_predict=20, **case) for case in cases]
    outcomes = await asyncio.gather(*(outcome(target, request) for request in requests))
    assert outcomes == ["OK"] * len(cases)


async def test_too_many_biases_are_refused(target: Server) -> None:
    whole = completion(logit_bias=dict.fromkeys(range(2048), 0.5))
    assert await outcome(target, whole) == "INVALID_FIELD"
    large = completion(logit_bias=dict.fromkeys(range(151_936), 0.5))
    assert await outcome(target, large) == "INVALID_FIELD"
