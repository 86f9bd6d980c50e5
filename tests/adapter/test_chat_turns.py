"""Conversations with a trained model: answers, and reuse of the turns before."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from runner_server.mlx_backend import MlxBackend
from support.harness import running

pytestmark = pytest.mark.mlx

MODEL = Path(__file__).parents[2] / "runner_server" / "demo" / "model"
TEMPLATE = (
    "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant\n{% endif %}"
)
OPTIONS = pb.CompletionOptions(seed=3, num_predict=24, temperature=0.8)


@pytest.fixture
async def stub(
    tmp_path: Path, socket_dir: Path
) -> AsyncIterator[runner_pb2_grpc.RunnerServiceAsyncStub]:
    """A server with a trained model and a chat template."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    async with running(socket_dir, MlxBackend()) as (_, channel, _ready):
        stub: runner_pb2_grpc.RunnerServiceAsyncStub = runner_pb2_grpc.RunnerServiceStub(channel)
        answer = await stub.Load(pb.LoadRequest(model=str(model), context_length=512))
        assert answer.model.capabilities.chat
        yield stub


async def ask(
    stub: runner_pb2_grpc.RunnerServiceAsyncStub, messages: list[pb.ChatMessage], **fields: Any
) -> tuple[str, list[int], pb.ChatResponse]:
    """Return the text of an answer, its token ids, and its last message."""
    fields.setdefault("options", OPTIONS)
    request = pb.ChatRequest(messages=messages, **fields)
    parts = [message async for message in stub.Chat(request)]
    ids = [id_ for part in parts for id_ in part.token_ids]
    return "".join(part.content for part in parts), ids, parts[-1]


def user(text: str) -> pb.ChatMessage:
    """Return a message of the user."""
    return pb.ChatMessage(role=pb.ROLE_USER, content=text)


async def test_the_next_turn_reuses_the_last_one(
    stub: runner_pb2_grpc.RunnerServiceAsyncStub,
) -> None:
    messages = [pb.ChatMessage(role=pb.ROLE_SYSTEM, content="Write Python."), user("Read a file.")]
    last_prompt: list[int] = []
    last_turn: list[int] = []
    for _ in range(3):
        rendered = await stub.RenderChat(pb.RenderChatRequest(messages=messages))
        prompt = list(rendered.token_ids)
        text, ids, done = await ask(stub, messages)
        assert done.prompt_eval_count == len(prompt)
        assert done.prompt_cached_count >= len(last_prompt)
        # The answer too, up to its last token, which was not processed.
        assert done.prompt_cached_count >= min(_common(last_turn, prompt), len(last_turn) - 1)
        messages += [pb.ChatMessage(role=pb.ROLE_ASSISTANT, content=text), user("And then?")]
        last_prompt, last_turn = prompt, [*prompt, *ids]


async def test_salts_share_no_turns(stub: runner_pb2_grpc.RunnerServiceAsyncStub) -> None:
    messages = [user("Read a file, line by line, and print the longest line.")]

    async def cached(**fields: Any) -> int:
        return (await ask(stub, messages, **fields))[2].prompt_cached_count

    assert await cached(bypass_prefix_cache=True) == 0
    for salt in ("", "a", "b"):
        assert await cached(cache_salt=salt) == 0
        assert await cached(cache_salt=salt) > 0
        assert await cached(cache_salt=salt, bypass_prefix_cache=True) == 0


async def test_an_answer_obeys_its_constraint(
    stub: runner_pb2_grpc.RunnerServiceAsyncStub,
) -> None:
    schema = {
        "type": "object",
        "properties": {"line": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["line"],
        "additionalProperties": False,
    }
    options = pb.CompletionOptions(seed=3, num_predict=100)
    constraint = pb.Constraint(json_schema=json.dumps(schema))
    text, _, done = await ask(stub, [user("Which line?")], options=options, constraint=constraint)
    jsonschema.validate(json.loads(text), schema)
    assert done.constraint_satisfied


def _common(a: list[int], b: list[int]) -> int:
    """Return the length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))


async def test_an_answer_is_the_completion_of_the_prompts_tokens(
    stub: runner_pb2_grpc.RunnerServiceAsyncStub,
) -> None:
    messages = [user("Read a file.")]
    rendered = await stub.RenderChat(pb.RenderChatRequest(messages=messages))
    text, _, _ = await ask(stub, messages)
    request = pb.CompletionRequest(
        prompt_token_ids=pb.TokenIds(ids=rendered.token_ids), options=OPTIONS
    )
    parts = [part.content async for part in stub.Completion(request)]
    assert text == "".join(parts)
    assert text
