"""What attackers and broken clients are known to send, against real MLX.

Several of these end other servers: a segfault for a token id out of range, a thread that
dies of an empty prompt, a batch that fails for one row's `top_k`.
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
from support.hostile_requests import INVALID_UTF8, TEXTS, encode_field, encode_varint

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
pytestmark = [pytest.mark.mlx, pytest.mark.asyncio(loop_scope="module")]

MEGABYTE = 10**6
BILLION = 10**9


async def ending(target: Server, request: Message) -> str:
    """How a call with this request ends; the rpc follows from its type."""
    name = request.DESCRIPTOR.name.removesuffix("Request")
    return await Caller(target.channel).send((name, request.SerializeToString()))


def completion(prompt: str = "def", **options: Any) -> pb.CompletionRequest:
    """A request for a few tokens."""
    chosen: dict[str, Any] = {"num_predict": 4} | options
    return pb.CompletionRequest(prompt=prompt, options=pb.CompletionOptions(**chosen))


async def test_empty_prompts(target: Server) -> None:
    empty = pb.CompletionRequest(prompt_token_ids=pb.TokenIds())
    for request in (completion(""), empty, pb.CompletionRequest()):
        assert await ending(target, request) == "INVALID_FIELD"
    assert await ending(target, pb.TokenizeRequest()) == "OK"
    assert await ending(target, pb.DetokenizeRequest()) == "OK"


@pytest.mark.parametrize("unit", ["x", " ", "\0", "😀", "\u202eש", "def f(x):\n", "<|end|>"])
async def test_a_prompt_of_ten_megabytes(target: Server, unit: str) -> None:
    """Splitting all of it would take six seconds and two gigabytes."""
    problem = await failure(target.start(unit * (10 * MEGABYTE // len(unit.encode()))))
    assert problem.reason == "PROMPT_TOO_LONG"
    # What its beginning has at least, not the millions of the whole.
    assert CONTEXT_LENGTH < int(problem.metadata["promptTokens"]) < MEGABYTE / 2


async def test_ten_megabytes_in_every_text(target: Server) -> None:
    text = "x" * (10 * MEGABYTE)
    requests: list[Message] = [
        pb.LoadRequest(model=text),
        pb.EstimateRequest(model=text),
        pb.CompletionRequest(prompt="x", request_id=text),
        completion(stop=[text]),
        pb.TokenizeRequest(content=text),
    ]
    endings = [await ending(target, request) for request in requests]
    assert endings == ["INVALID_FIELD"] * len(requests)


async def test_all_special_tokens(target: Server) -> None:
    texts = ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>"]
    assert await ending(target, completion("".join(texts))) == "OK"
    assert await ending(target, completion(texts[0] * (CONTEXT_LENGTH - 1))) == "OK"
    ids = pb.TokenIds(ids=list(range(len(texts))) * 3)
    options = pb.CompletionOptions(num_predict=4)
    request = pb.CompletionRequest(prompt_token_ids=ids, options=options, logprobs=20)
    assert await ending(target, request) == "OK"
    assert await ending(target, completion(stop=texts, logit_bias={0: 100.0})) == "OK"


@pytest.mark.parametrize("id_", [-1, 2048, MEGABYTE, BILLION, 2**31 - 1, -(2**31)])
async def test_ids_that_the_model_does_not_have(target: Server, id_: int) -> None:
    requests: list[Message] = [
        pb.CompletionRequest(prompt_token_ids=pb.TokenIds(ids=[5, id_])),
        pb.DetokenizeRequest(token_ids=[5, id_]),
        completion(logit_bias={id_: 1.0}),
    ]
    endings = [await ending(target, request) for request in requests]
    assert endings == ["INVALID_FIELD"] * len(requests)


def _texts(descriptor: Descriptor, data: bytes) -> Iterator[bytes]:
    """A message for each of its string fields, with this in it."""
    for field in descriptor.fields:
        if field.type == FieldDescriptor.TYPE_STRING:
            yield encode_field(field.number, 2, data)
        elif field.message_type and not field.message_type.GetOptions().map_entry:
            inside = _texts(field.message_type, data)
            yield from (encode_field(field.number, 2, message) for message in inside)


@pytest.mark.parametrize("data", INVALID_UTF8)
async def test_lone_surrogates_and_other_bytes_that_are_no_text(
    target: Server, data: bytes
) -> None:
    caller, count = Caller(target.channel), 0
    for name, kind in (
        ("Load", pb.LoadRequest),
        ("Estimate", pb.EstimateRequest),
        ("Completion", pb.CompletionRequest),
        ("Tokenize", pb.TokenizeRequest),
    ):
        for request in _texts(kind.DESCRIPTOR, data):
            assert await caller.send((name, request)) == "INVALID_FIELD"
            count += 1
    assert count == 6


async def test_nul_right_to_left_and_their_like_come_back_from_tokens(target: Server) -> None:
    for text in TEXTS:
        answer = await target.stub.Tokenize(pb.TokenizeRequest(content=text))
        request = pb.DetokenizeRequest(token_ids=answer.token_ids)
        assert (await target.stub.Detokenize(request)).content == text


async def test_nul_right_to_left_and_their_like_in_every_text(target: Server) -> None:
    texts = [text for text in TEXTS if 0 < len(text) < 30]
    assert len(texts) > 8
    requests: list[Message] = []
    for text in texts:
        requests += [completion(text), completion(stop=[text]), completion()]
        requests[-1].MergeFrom(pb.CompletionRequest(request_id=text))
    endings = await asyncio.gather(*(ending(target, request) for request in requests))
    assert endings == ["OK"] * len(requests)


async def test_a_hundred_thousand_stop_strings(target: Server) -> None:
    request = completion(stop=[f"stop {i}" for i in range(100_000)])
    assert await ending(target, request) == "INVALID_FIELD"
    longest = completion(stop=["a" * 1023 + chr(0x4E00 + i) for i in range(64)])
    assert await ending(target, longest) == "OK"


async def test_a_stop_string_of_a_megabyte(target: Server) -> None:
    assert await ending(target, completion(stop=["s" * MEGABYTE])) == "INVALID_FIELD"


FLOATS = [
    field.name
    for field in pb.CompletionOptions.DESCRIPTOR.fields
    if field.type == FieldDescriptor.TYPE_FLOAT
]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
async def test_nan_and_infinity_in_every_float(target: Server, value: float) -> None:
    assert len(FLOATS) == 6
    for field in FLOATS:
        options: dict[str, Any] = {field: value}
        assert await ending(target, completion(**options)) == "INVALID_FIELD"
    assert await ending(target, completion(logit_bias={5: value})) == "INVALID_FIELD"
    # The other bits of a number that is none.
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
    "logprobs": "INVALID_FIELD",
}


def _numbers(message: Message) -> set[str]:
    return {
        field.name
        for field in message.DESCRIPTOR.fields
        if field.type in (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64)
    }


async def test_a_billion_in_every_number(target: Server) -> None:
    in_options = {f"options.{name}" for name in _numbers(pb.CompletionOptions())}
    assert in_options | _numbers(pb.CompletionRequest()) == BILLION_ENDINGS.keys()
    for field, expected in BILLION_ENDINGS.items():
        request = completion()
        part = request.options if "." in field else request
        setattr(part, field.removeprefix("options."), BILLION)
        assert await ending(target, request) == expected, field


LOAD_BILLION_ENDINGS = {
    "context_length": "INVALID_FIELD",
    "parallel": "INVALID_FIELD",
    "dtype": "INVALID_FIELD",
    "memory_limit_bytes": "OK",
    "prefix_cache_bytes": "OK",
}


async def test_a_billion_in_every_number_of_a_load(real: Server) -> None:
    assert {*_numbers(pb.LoadRequest()), "dtype"} == LOAD_BILLION_ENDINGS.keys()
    caller = Caller(real.channel)
    for field, expected in LOAD_BILLION_ENDINGS.items():
        number = pb.LoadRequest.DESCRIPTOR.fields_by_name[field].number
        data = pb.LoadRequest(model=str(DEMO)).SerializeToString()
        call = ("Load", data + encode_field(number, 0, encode_varint(BILLION)))
        assert await caller.send(call) == expected, field
    await real.load(str(DEMO), context_length=CONTEXT_LENGTH)


async def test_a_billion_in_every_number_of_an_estimate(target: Server) -> None:
    assert {*_numbers(pb.EstimateRequest()), "dtype"} == LOAD_BILLION_ENDINGS.keys()
    for field, expected in LOAD_BILLION_ENDINGS.items():
        number = pb.EstimateRequest.DESCRIPTOR.fields_by_name[field].number
        data = pb.EstimateRequest(model=str(DEMO)).SerializeToString()
        call = ("Estimate", data + encode_field(number, 0, encode_varint(BILLION)))
        assert await Caller(target.channel).send(call) == expected, field


async def test_a_billion_in_a_trim(target: Server) -> None:
    for size in (BILLION, 2**63 - 1):
        assert await ending(target, pb.TrimRequest(prefix_cache_bytes=size)) == "OK"
    assert await ending(target, pb.TrimRequest(prefix_cache_bytes=-BILLION)) == "INVALID_FIELD"


async def test_extremes_that_are_allowed_together(target: Server) -> None:
    """Each is in its range; none may raise in a step that others share."""
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
    endings = await asyncio.gather(*(ending(target, request) for request in requests))
    assert endings == ["OK"] * len(cases)


async def test_a_bias_for_the_whole_vocabulary(target: Server) -> None:
    whole = completion(logit_bias=dict.fromkeys(range(2048), 0.5))
    assert await ending(target, whole) == "INVALID_FIELD"
    large = completion(logit_bias=dict.fromkeys(range(151_936), 0.5))
    assert await ending(target, large) == "INVALID_FIELD"
