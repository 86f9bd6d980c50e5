"""Two runners with vLLM's contract behind the SMG gateway, asked by OpenAI's client."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.embedding_models import say_that_it_embeds
from support.gateway import DEMO, Fleet, fleet, wait_for
from support.gateway_client import chat, client, kill_one_of_two, text_of

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
pytest.importorskip("smg_grpc_proto", reason="smg-grpc-proto is not installed (the extra smg)")
pytest.importorskip("smg", reason="the gateway is not installed (make gateways)")
pytest.importorskip("openai", reason="openai is not installed (make gateways)")

import openai

from mlxrunner.v1 import runner_pb2 as pb

pytestmark = [pytest.mark.mlx, pytest.mark.timeout(300)]


SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A gateway with two runners."""
    with fleet(tmp_path_factory.mktemp("fleet"), 2, contract="--vllm") as found:
        yield found


@pytest.fixture(scope="module")
def ai(two: Fleet) -> Iterator[Any]:
    """OpenAI's client of the gateway with two runners."""
    with client(two) as made:
        yield made


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, Any]]:
    """A gateway with a runner whose model embeds, and a client."""
    directory = tmp_path_factory.mktemp("embedding")
    model = say_that_it_embeds(Path(shutil.copytree(DEMO, directory / "embeds")))
    with fleet(directory, 1, contract="--vllm", model=model) as found, client(found) as made:
        yield found, made


def finished_count(found: Fleet) -> list[int]:
    """Return the number of finished requests of each runner."""
    return [child.log.read_text().count(" VllmEngine.Generate ") for child in found.runners]


def test_the_gateway_takes_the_runners_for_vllm(two: Fleet) -> None:
    for worker in two.workers():
        assert (worker["runtime_type"], worker["connection_mode"]) == ("vllm", "grpc")
        assert worker["models"][0]["context_length"] == 1024


def test_a_stream_has_the_text_of_the_whole_answer(ai: Any) -> None:
    whole = chat(ai, 30, temperature=0).choices[0].message.content
    chunks = list(chat(ai, 30, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == whole
    assert chunks[-1].usage.completion_tokens == 30


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_not_in_the_text(ai: Any, *, stream: bool) -> None:
    whole = chat(ai, 30, temperature=0).choices[0].message.content
    stop = whole.split()[3]
    answer = chat(ai, 30, temperature=0, stop=[stop], stream=stream)
    if stream:
        chunks = list(answer)
        text, reason = text_of(chunks), chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_three_answers(ai: Any, *, stream: bool) -> None:
    answer = chat(ai, 12, n=3, temperature=1.0, seed=7, stream=stream)
    texts = ["", "", ""]
    for part in answer if stream else [answer]:
        for choice in part.choices:
            said = choice.delta.content if stream else choice.message.content
            texts[choice.index] += said or ""
    assert len(set(texts)) == 3
    assert all(texts)


def test_a_schema_is_obeyed(ai: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "age", "schema": SCHEMA}}
    said = chat(ai, 100, temperature=0, response_format=form).choices[0].message.content
    assert 1 <= json.loads(said)["age"] <= 9


def test_logprobs(ai: Any) -> None:
    choice = chat(ai, 4, temperature=0, logprobs=True, top_logprobs=3).choices[0]
    assert len(choice.logprobs.content) == 4
    for entry in choice.logprobs.content:
        assert entry.token == entry.top_logprobs[0].token
        assert len(entry.top_logprobs) == 3


def test_a_required_tool_is_called(ai: Any) -> None:
    tool = {"type": "function", "function": {"name": "note", "parameters": SCHEMA}}
    # With a temperature, the demo model writes much white space.
    answer = chat(ai, 300, temperature=0, tools=[tool], tool_choice="required")
    (call,) = answer.choices[0].message.tool_calls[:1]
    assert call.function.name == "note"
    assert 1 <= json.loads(call.function.arguments)["age"] <= 9


def test_an_option_out_of_range_is_refused_by_name(ai: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape("sampling_params.top_k")):
        chat(ai, extra_body={"top_k": 99999})


def test_the_gateway_leaves_logit_bias_out(ai: Any) -> None:
    """Hold docs/scaling.md to what gateway 1.13.0 does: the runner would refuse this token."""
    assert chat(ai, 2, logit_bias={"99999": 1}).usage.completion_tokens == 2


def test_thirty_two_requests_at_once_are_served(two: Fleet, ai: Any) -> None:
    before = finished_count(two)

    def one(number: int) -> str:
        options = {"seed": number, "extra_body": {"ignore_eos": True}}
        answer = chat(ai, 20, content=f"Story {number}", **options)
        assert answer.usage.completion_tokens == 20
        return str(answer.choices[0].finish_reason)

    with ThreadPoolExecutor(32) as pool:
        assert set(pool.map(one, range(32))) == {"length"}
    wait_for(lambda: sum(finished_count(two)) == sum(before) + 32)
    assert all(now > past for now, past in zip(finished_count(two), before, strict=True))


def test_embeddings_are_those_of_the_runner(embedding: tuple[Fleet, Any]) -> None:
    found, ai = embedding
    text = "A story of a fox."
    answer = ai.embeddings.create(model="embeds", input=text, encoding_format="float")
    own = found.runners[0].stub.Embed(pb.EmbedRequest(inputs=[pb.EmbedInput(text=text)]))
    assert answer.data[0].embedding == pytest.approx(list(own.embeddings[0].values), abs=1e-5)
    assert answer.usage.prompt_tokens == own.embeddings[0].token_count


def test_the_gateway_makes_one_text_of_several_to_embed(embedding: tuple[Fleet, Any]) -> None:
    """Hold docs/gateways.md to what gateway 1.13.0 does; the contract takes one text a call."""
    _, ai = embedding
    answer = ai.embeddings.create(model="embeds", input=["A fox.", "A bear."])
    assert len(answer.data) == 1


def test_cache_aware_routing_finds_the_runner_with_the_prompt(tmp_path: Path) -> None:
    """Ask three conversations in turn, which round robin sends to the other runner each time."""
    options = ["--policy", "cache_aware"]
    with fleet(tmp_path, 2, contract="--vllm", options=options) as found, client(found) as ai:
        for turn in range(3):
            for animal in ("fox", "bear", "owl"):
                told = f"Tell me only stories of the {animal}. " * 12
                usage = chat(ai, 2, content=f"{told} Story {turn}.").usage
                if turn:
                    assert usage.prompt_tokens_details.cached_tokens > 0.8 * usage.prompt_tokens


def test_a_killed_runner_costs_only_its_own_streams(tmp_path_factory: Any) -> None:
    directory = tmp_path_factory.mktemp("killed")
    with fleet(directory, 2, contract="--vllm") as found, client(found) as ai:
        kill_one_of_two(found, ai)
