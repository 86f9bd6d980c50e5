"""Completions and conversations take the same fields, with one meaning."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import AsyncRunnerClient, AsyncRunnerProcess, RunnerClient, RunnerProcess
from runner_client.rpc.messages import chats, requests
from runner_common.generation_fields import SHARED_FIELDS, shared_fields

OF_COMPLETIONS = {"prompt", "prompt_token_ids", "prompt_logprobs"}
OF_CONVERSATIONS = {
    *("messages", "tools", "tool_choice", "tool_name", "chat_template_kwargs"),
    "reasoning_budget",
}
COMPLETION = dict(pb.CompletionRequest.DESCRIPTOR.fields_by_name)
CHAT = dict(pb.ChatRequest.DESCRIPTOR.fields_by_name)
VALIDATION = Path(__file__).parents[2] / "runner_server/api/validation.py"

METHODS: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
    (requests.completion_request, chats.chat_request),
    *((each.completion, each.chat) for each in (AsyncRunnerClient, RunnerClient)),
    *((each.complete, each.complete_chat) for each in (AsyncRunnerClient, RunnerClient)),
    *((each.completion, each.chat) for each in (AsyncRunnerProcess, RunnerProcess)),
]


def test_every_other_field_is_in_both_requests() -> None:
    assert COMPLETION.keys() - SHARED_FIELDS == OF_COMPLETIONS
    assert CHAT.keys() - SHARED_FIELDS == OF_CONVERSATIONS


@pytest.mark.parametrize("name", sorted(SHARED_FIELDS))
def test_a_shared_field_has_one_type(name: str) -> None:
    def kind(field: FieldDescriptor) -> tuple[object, ...]:
        return field.type, field.is_repeated, field.has_presence, field.message_type

    assert kind(COMPLETION[name]) == kind(CHAT[name])


@pytest.mark.parametrize("name", sorted(SHARED_FIELDS - {"model", "literal"}))
def test_the_server_reads_a_shared_field_from_both(name: str) -> None:
    # The name of the model is read before the request is validated, `literal` with the prompt.
    text = VALIDATION.read_text()
    shared = text[text.index("def generation_draft(") :]
    assert re.search(rf'\brequest\.{name}\b|request, "{name}"', shared)


@pytest.mark.parametrize(("complete", "chat"), METHODS, ids=lambda each: each.__qualname__)
def test_the_client_takes_the_same_arguments(
    complete: Callable[..., Any], chat: Callable[..., Any]
) -> None:
    def arguments(method: Callable[..., Any], own: set[str]) -> dict[str, object]:
        found = inspect.signature(method).parameters.values()
        return {each.name: each.default for each in found if each.name not in own}

    expected = arguments(complete, OF_COMPLETIONS | {"self"})
    assert arguments(chat, OF_CONVERSATIONS | {"self"}) == expected
    assert expected.keys() >= SHARED_FIELDS - {"model"}


def values(field: FieldDescriptor) -> Iterator[Any]:
    """Yield values of a field, the default of its type among them."""
    if field.message_type is pb.CompletionOptions.DESCRIPTOR:
        yield pb.CompletionOptions(seed=0, stop=["x"])
    elif field.message_type:
        yield pb.Constraint(json_object=pb.JsonObject())
    elif field.is_repeated:
        yield from ([], [0, 5])
    elif field.type == FieldDescriptor.TYPE_STRING:
        yield from ("", "é")
    else:
        yield from (0, 1)


def test_every_shared_field_is_copied_as_it_is() -> None:
    draw = random.Random(3)  # noqa: S311 - pseudo-random cases
    for _ in range(50):
        chosen = {name: draw.choice([*values(COMPLETION[name])]) for name in SHARED_FIELDS}
        chosen = {name: value for name, value in chosen.items() if draw.random() < 0.7}
        completion, chat = pb.CompletionRequest(**chosen), pb.ChatRequest(**chosen)
        assert pb.ChatRequest(**shared_fields(completion)) == chat
        assert pb.CompletionRequest(**shared_fields(chat)) == completion
