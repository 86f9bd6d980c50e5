"""OpenAI's own client against a server and a pool."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

import openai

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from support.http_child import HttpChild

pytestmark = pytest.mark.mlx

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}},
            "required": ["place"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"word": {"enum": ["left", "right"]}, "size": {"enum": [1, 2]}},
    "required": ["word", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def ai(child: HttpChild) -> Iterator[Any]:
    """OpenAI's client, without retries."""
    with openai.OpenAI(base_url=f"{child.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(ai: Any) -> str:
    """The only model."""
    (found,) = ai.models.list()
    assert ai.models.retrieve(found.id) == found
    return str(found.id)


@pytest.fixture(scope="module")
def stub(child: HttpChild) -> Iterator[runner_pb2_grpc.RunnerServiceStub]:
    """A client of gRPC on the same process."""
    with grpc.insecure_channel(child.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        yield runner_pb2_grpc.RunnerServiceStub(channel)


def chat(ai: Any, model: str, content: str = "Tell me a story.", **options: Any) -> Any:
    messages = options.pop("messages", [{"role": "user", "content": content}])
    options.setdefault("max_completion_tokens", 12)
    return ai.chat.completions.create(model=model, messages=messages, **options)


def complete(ai: Any, model: str, prompt: Any = "import", **options: Any) -> Any:
    options.setdefault("max_tokens", 8)
    return ai.completions.create(model=model, prompt=prompt, **options)


def joined(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def test_a_chat_is_that_of_grpc(ai: Any, model: str, stub: Any) -> None:
    answer = chat(ai, model, seed=5, temperature=0.7)
    options = pb.CompletionOptions(temperature=0.7, top_p=1, top_k=0, num_predict=12, seed=5)
    message = pb.ChatMessage(role=pb.ROLE_USER, content="Tell me a story.")
    parts = list(stub.Chat(pb.ChatRequest(messages=[message], options=options)))
    (choice,) = answer.choices
    assert choice.message.content == "".join(part.content for part in parts)
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    end = parts[-1]
    assert answer.usage.prompt_tokens == end.prompt_eval_count
    assert answer.usage.completion_tokens == end.eval_count == 12
    assert answer.usage.total_tokens == end.prompt_eval_count + 12
    assert (answer.object, answer.model) == ("chat.completion", model)


def test_a_stream_has_the_same_text_and_usage(ai: Any, model: str) -> None:
    whole = chat(ai, model, temperature=0, max_completion_tokens=30)
    chunks = list(
        chat(
            ai,
            model,
            temperature=0,
            max_completion_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert joined(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_known_prompt_is_taken_from_the_cache(ai: Any, model: str) -> None:
    asked = [
        chat(ai, model, "A prompt of this test only.", max_completion_tokens=1) for _ in range(2)
    ]
    details = asked[1].usage.prompt_tokens_details
    assert details.cached_tokens == asked[1].usage.prompt_tokens - 1


@pytest.mark.parametrize("stream", [False, True])
def test_choices_have_seeds_that_follow_each_other(ai: Any, model: str, *, stream: bool) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "max_completion_tokens": 8}
    alone = [chat(ai, model, seed=seed, **options).choices[0].message.content for seed in (7, 8, 9)]
    answer = chat(ai, model, seed=7, n=3, stream=stream, **options)
    if stream:
        chunks = list(answer)
        texts = [joined(chunks, index) for index in range(3)]
    else:
        texts = [choice.message.content for choice in answer.choices]
        assert answer.usage.completion_tokens == 24
    assert texts == alone
    assert len(set(texts)) > 1


def test_a_stop_string_ends_the_text(ai: Any, model: str) -> None:
    text = chat(ai, model, temperature=0, max_completion_tokens=40).choices[0].message.content
    word = text.split()[3]
    for stop in (word, ["nowhere", word]):
        choice = chat(ai, model, temperature=0, max_completion_tokens=40, stop=stop).choices[0]
        assert choice.message.content == text[: text.index(word)]
        assert choice.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(ai: Any, model: str, *, stream: bool) -> None:
    answer = chat(
        ai,
        model,
        temperature=0,
        max_completion_tokens=4,
        logprobs=True,
        top_logprobs=3,
        stream=stream,
    )
    choices = [each for chunk in answer for each in chunk.choices] if stream else answer.choices
    entries = [entry for each in choices if each.logprobs for entry in each.logprobs.content]
    assert len(entries) == 4
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.token == entry.top_logprobs[0].token
        assert math.isclose(entry.logprob, entry.top_logprobs[0].logprob)
        assert bytes(entry.bytes).decode() == entry.token


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_completion(ai: Any, model: str, *, stream: bool) -> None:
    answer = complete(ai, model, temperature=0, logprobs=2, stream=stream)
    choices = [each for chunk in answer for each in chunk.choices] if stream else answer.choices
    text = "".join(each.text for each in choices)
    found = [each.logprobs for each in choices if each.logprobs]
    tokens = [token for each in found for token in each.tokens]
    offsets = [offset for each in found for offset in each.text_offset]
    assert "".join(tokens) == text
    assert [text[at:].startswith(token) for at, token in zip(offsets, tokens, strict=True)]
    for each in found:
        for token, top in zip(each.tokens, each.top_logprobs, strict=True):
            assert token in top
            assert len(top) == 2


def test_a_question_is_answered_with_a_call(ai: Any, model: str) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    options: dict[str, Any] = {"tools": [WEATHER], "temperature": 0, "max_completion_tokens": 60}
    choice = chat(ai, model, messages=messages, **options).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"place": "Oslo"}
    chunks = list(chat(ai, model, messages=messages, stream=True, **options))
    deltas = [each.delta for chunk in chunks for each in chunk.choices]
    (streamed,) = [part for delta in deltas for part in delta.tool_calls or ()]
    assert streamed.index == 0
    assert streamed.function.arguments == call.function.arguments
    # The client's own message goes back as it is.
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert "sunny" in chat(ai, model, messages=messages, **options).choices[0].message.content


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str
)
def test_a_call_may_be_required(ai: Any, model: str, choice: Any) -> None:
    options: dict[str, Any] = {"tools": [WEATHER], "tool_choice": choice}
    answer = chat(ai, model, "Hi!", max_completion_tokens=80, seed=1, **options)
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments).keys() == {"place"}


def test_one_call_at_most_if_calls_may_not_be_parallel(ai: Any, model: str) -> None:
    options: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required"}
    answer = chat(ai, model, "Hi!", parallel_tool_calls=False, max_completion_tokens=200, **options)
    assert len(answer.choices[0].message.tool_calls) == 1


def test_a_schema_binds_the_answer(ai: Any, model: str) -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    answer = chat(ai, model, response_format=format_, max_completion_tokens=60, seed=2)
    found = json.loads(answer.choices[0].message.content)
    assert found["word"] in ("left", "right")
    assert found["size"] in (1, 2)
    text = chat(ai, model, response_format={"type": "json_object"}, seed=2)
    assert text.choices[0].message.content.startswith("{")


def test_prompts_of_a_completion(ai: Any, model: str) -> None:
    texts = [complete(ai, model, each, temperature=0).choices[0].text for each in ("def", "import")]
    both = complete(ai, model, ["def", "import"], temperature=0, n=2)
    assert [choice.text for choice in both.choices] == [texts[0]] * 2 + [texts[1]] * 2
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    streamed = complete(ai, model, ["def", "import"], temperature=0, stream=True)
    found = ["", ""]
    for chunk in streamed:
        for choice in chunk.choices:
            found[choice.index] += choice.text
    assert found == texts


def test_vectors_as_numbers_and_base64(ai: Any, model: str, stub: Any) -> None:
    asked = ["one", "another text"]
    inputs = [pb.EmbedInput(text=text) for text in asked]
    expected = stub.Embed(pb.EmbedRequest(inputs=inputs))
    answer = ai.embeddings.create(model=model, input=asked, encoding_format="float")
    for vector, same in zip(answer.data, expected.embeddings, strict=True):
        assert vector.embedding == pytest.approx(list(same.values))
    assert answer.usage.prompt_tokens == expected.prompt_eval_count
    raw = ai.embeddings.with_raw_response.create(model=model, input="one", encoding_format="base64")
    packed = base64.b64decode(json.loads(raw.text)["data"][0]["embedding"])
    assert struct.unpack(f"<{len(packed) // 4}f", packed) == pytest.approx(
        list(expected.embeddings[0].values)
    )
    ids = ai.embeddings.create(model=model, input=[[5, 6], [7]])
    assert ids.usage.prompt_tokens == 3


def test_a_prompt_that_is_too_long(ai: Any, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(ai, model, "word " * 3000)
    assert refused.value.code == "PROMPT_TOO_LONG"
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError):
        chat(ai, model, "word " * 3000, stream=True)


def test_an_unknown_model(ai: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        chat(ai, "nobody/knows-this")
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("nobody/knows-this")


def test_an_option_out_of_range_has_the_name_of_the_interface(ai: Any, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(ai, model, temperature=200)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as refused:
        chat(ai, model, extra_body={"min_tokens": 13})
    assert refused.value.param == "min_tokens"
