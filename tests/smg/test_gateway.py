"""Two runners behind the SMG gateway, asked over HTTP by OpenAI's client."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.gateway import DEMO, Fleet, fleet, hiding, wait_for
from support.gateway_client import DEADLINE_SECONDS, chat, client, kill_one_of_two, text_of
from support.server_child import Child

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
pytest.importorskip("smg_grpc_proto", reason="smg-grpc-proto is not installed (the extra smg)")
pytest.importorskip("smg", reason="the gateway is not installed (make gateways)")
pytest.importorskip("openai", reason="openai is not installed (make gateways)")

import openai
from smg_grpc_proto import mlx_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2
from tokenizers import Tokenizer

from mlxrunner.v1 import runner_pb2 as pb

pytestmark = [pytest.mark.mlx, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A gateway with two runners."""
    with fleet(tmp_path_factory.mktemp("fleet"), 2) as found:
        yield found


@pytest.fixture(scope="module")
def ai(two: Fleet) -> Iterator[Any]:
    """OpenAI's client of the gateway with two runners."""
    with client(two) as made:
        yield made


def generated_counts(child: Child) -> list[int]:
    """Return the token count of each finished request."""
    found = re.findall(r" Generate .* generated_tokens=(\d+)", child.log.read_text())
    return [int(count) for count in found]


def finished_count(child: Child) -> int:
    return len(generated_counts(child))


def test_the_gateway_finds_both_runners_and_their_properties(two: Fleet, ai: Any) -> None:
    assert [model.id for model in ai.models.list()] == ["model"]
    workers = two.workers()
    addresses = {f"grpc://{child.ready.address}" for child in two.runners}
    assert {worker["url"] for worker in workers} == addresses
    for worker in workers:
        assert (worker["runtime_type"], worker["connection_mode"]) == ("mlx", "grpc")
        assert worker["models"][0]["context_length"] == 1024
        assert worker["labels"]["eos_token_ids"] == "[0,1]"  # noqa: S105 - no secret


def test_a_chat_uses_the_models_template(ai: Any, two: Fleet) -> None:
    answer = chat(ai, temperature=0)
    choice = answer.choices[0]
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert answer.usage.completion_tokens == 12
    # The same prompt, put together here and sent over our own protocol.
    prompt = "<|user|>\nTell me a story.<|end|>\n<|assistant|>\n"
    options = pb.CompletionOptions(num_predict=12, temperature=0)
    request = pb.CompletionRequest(prompt=prompt, options=options)
    messages = list(two.runners[0].stub.Completion(request, timeout=DEADLINE_SECONDS))
    assert "".join(message.content for message in messages) == choice.message.content
    assert messages[-1].prompt_eval_count == answer.usage.prompt_tokens


def test_requests_are_spread_over_both_runners(two: Fleet, ai: Any) -> None:
    before = [finished_count(child) for child in two.runners]
    for _ in range(4):
        chat(ai, 2)
    wait_for(lambda: sum(finished_count(child) for child in two.runners) == sum(before) + 4)
    assert [finished_count(child) for child in two.runners] == [count + 2 for count in before]


def test_a_stream_has_the_same_text(ai: Any) -> None:
    whole = chat(ai, 30, temperature=0).choices[0].message.content
    chunks = list(chat(ai, 30, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == whole
    assert sum(bool(text_of([chunk])) for chunk in chunks) > 1
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons[-1] == "length"
    assert chunks[-1].usage.completion_tokens == 30


def test_a_seed_gives_the_same_text_on_either_runner(ai: Any) -> None:
    said = [chat(ai, seed=7, temperature=1.0).choices[0].message.content for _ in range(2)]
    other = chat(ai, seed=8, temperature=1.0).choices[0].message.content
    assert said[0] == said[1] != other


def test_tokens_from_the_prefix_cache_are_reported(ai: Any) -> None:
    asked = [chat(ai, 2, content="A prompt that nobody else has.") for _ in range(3)]
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in asked]
    # One runner after the other; then the first has the prompt. Every chat begins alike.
    common = len(_tokenizer().encode("<|user|>\n").ids)
    assert max(cached[:2]) <= common
    assert cached[2] == asked[2].usage.prompt_tokens - 1


def _tokenizer() -> Any:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_greedy_tokens(ai: Any, *, stream: bool) -> None:
    answer = chat(ai, 4, temperature=0, logprobs=True, top_logprobs=3, stream=stream)
    choices = [c for chunk in answer for c in chunk.choices] if stream else answer.choices
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert len(entries) == 4
    for entry in entries:
        likeliest = [top.logprob for top in entry.top_logprobs]
        assert len(likeliest) == 3
        assert likeliest == sorted(likeliest, reverse=True)
        # Without temperature the likeliest token is drawn.
        assert entry.logprob == pytest.approx(likeliest[0])
        assert entry.token == entry.top_logprobs[0].token


def test_a_stop_token_ends_the_answer(ai: Any) -> None:
    whole = chat(ai, 12, temperature=0, logprobs=True, top_logprobs=0).choices[0]
    third = whole.logprobs.content[2].token
    (token_id,) = _tokenizer().encode(third, add_special_tokens=False).ids
    options = {"stop_token_ids": [token_id]}
    answer = chat(ai, 12, temperature=0, extra_body=options)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 3
    assert whole.message.content.startswith(answer.choices[0].message.content)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"stop": ["\n"]}, "string stop sequences"),
        ({"n": 2}, "n > 1"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"99999": 1}}, "sampling_params.logit_bias[99999]"),
        ({"extra_body": {"top_k": 99999}}, "sampling_params.top_k"),
    ],
)
def test_an_unsupported_option_is_refused_by_name(ai: Any, options: Any, name: str) -> None:
    """Refuse three in the gateway, which has no field for these, and the others in the runner."""
    with pytest.raises(openai.BadRequestError) as caught:
        chat(ai, **options)
    assert name in str(caught.value)


def test_a_prompt_longer_than_the_context_is_refused(ai: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="1024"):
        chat(ai, content="word " * 2000)


def test_a_disconnected_client_frees_its_slot(two: Fleet, ai: Any) -> None:
    before = [finished_count(child) for child in two.runners]
    stream = chat(ai, 900, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    # The gateway sends Abort and also ends its call.
    wait_for(lambda: sum(finished_count(child) for child in two.runners) == sum(before) + 1)
    new = [
        generated_counts(child)[count:] for child, count in zip(two.runners, before, strict=True)
    ]
    assert max(new)[0] < 900
    assert [child.status().running_count for child in two.runners] == [0, 0]


def test_thirty_two_requests_at_once_are_served(two: Fleet, ai: Any) -> None:
    before = [finished_count(child) for child in two.runners]

    def one(number: int) -> tuple[str, int]:
        options: dict[str, Any] = {"seed": number, "extra_body": {"ignore_eos": True}}
        if number % 2:
            answer = chat(ai, 20, content=f"Story {number}", **options)
            return answer.choices[0].finish_reason, answer.usage.completion_tokens
        options["stream_options"] = {"include_usage": True}
        *_, last, usage = chat(ai, 20, content=f"Story {number}", stream=True, **options)
        return last.choices[0].finish_reason, usage.usage.completion_tokens

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(one, range(32))) == [("length", 20)] * 32
    wait_for(lambda: sum(finished_count(child) for child in two.runners) == sum(before) + 32)
    assert all(
        finished_count(child) > count for child, count in zip(two.runners, before, strict=True)
    )


def test_a_killed_runner_costs_only_its_own_streams(tmp_path: Path) -> None:
    """Streams on the killed runner end with an error; the other runner does the rest."""
    with fleet(tmp_path, 2) as found, client(found) as ai:
        _, survivor = found.runners
        kill_one_of_two(found, ai)
        assert survivor.status().running_count == 0
        # The gateway goes on with the remaining runner.
        assert chat(ai, 3).usage.completion_tokens == 3


def test_a_gateway_on_another_machine_gets_the_tokenizer(tmp_path: Path) -> None:
    """Without the model's directory the gateway asks the runner for the tokenizer."""
    alone = hiding(DEMO)
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("a directory cannot be hidden from one process here (unshare, Linux)")
    with fleet(tmp_path, 1, alone=alone) as found, client(found) as ai:
        answer = chat(ai, 5, temperature=0)
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens == 12
    assert "GetTokenizer OK" in found.runners[0].log.read_text()


def test_the_tokenizer_can_be_fetched(two: Fleet, tmp_path: Path) -> None:
    stub = mlx_engine_pb2_grpc.MlxEngineStub(two.runners[0].channel)
    parts = list(stub.GetTokenizer(common_pb2.GetTokenizerRequest(), timeout=DEADLINE_SECONDS))
    data = b"".join(part.data for part in parts)
    assert hashlib.sha256(data).hexdigest() == parts[-1].sha256
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(tmp_path)
    sent = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "def f(x):\n    return x"
    assert sent.encode(text).ids == _tokenizer().encode(text).ids
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "add_generation_prompt" in config["chat_template"]
