"""Adapters of requests, from the request to the executor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.contract import MAX_CACHE_SALT_CHARS
from runner_server.api.validation import completion_draft
from runner_server.distributed.leader import LeaderBackend
from runner_server.engine.adapters import AdapterInfo, AdapterSpec
from runner_server.engine.types import LoadSpec
from runner_server.errors import InvalidField
from support.fakes import FakeBackend, model_info
from support.harness import Server, failure

ADAPTERS = [pb.Adapter(name="sql", path="/adapters/sql"), pb.Adapter(name="fr", path="/a/fr")]
EIGHT = ", ".join(f"'a{i}'" for i in range(8))
SQL = AdapterInfo("sql", "/adapters/sql", "digest of sql")


async def test_status_lists_the_adapters(server: Server) -> None:
    response = await server.load(adapters=ADAPTERS)
    assert list(response.model.adapters) == ADAPTERS
    assert list((await server.status()).model.adapters) == ADAPTERS
    await server.load()
    assert not (await server.status()).model.adapters


async def test_the_adapter_of_a_request_reaches_the_executor(server: Server) -> None:
    await server.load(adapters=ADAPTERS)
    for name in ("sql", "", "fr"):
        call = server.stub.Completion(
            pb.CompletionRequest(
                prompt="x", adapter=name, options=pb.CompletionOptions(num_predict=1)
            )
        )
        assert [message async for message in call][-1].done
    message = pb.ChatMessage(role=pb.ROLE_USER, content="x")
    options = pb.CompletionOptions(num_predict=1)
    chat = pb.ChatRequest(messages=[message], adapter="fr", options=options)
    assert [each async for each in server.stub.Chat(chat)][-1].done
    assert server.backend.adapters == ["sql", "", "fr", "fr"]
    # Without an adapter the policy is the default one, which the fake does not note.
    first, second, third = (policy.salt for policy in server.backend.policies)
    assert first != second == third


@pytest.mark.parametrize(
    ("adapters", "text"),
    [
        ((), "the loaded model has no adapter 'xx': it was loaded without any"),
        (ADAPTERS, "the loaded model has no adapter 'xx': it has 'sql', 'fr'"),
        (
            [pb.Adapter(name=f"a{i}", path="/a") for i in range(10)],
            f"the loaded model has no adapter 'xx': it has {EIGHT} and 2 more",
        ),
    ],
)
async def test_an_unknown_adapter_is_refused_with_those_there_are(
    server: Server, adapters: list[pb.Adapter], text: str
) -> None:
    await server.load(adapters=adapters)
    message = pb.ChatMessage(role=pb.ROLE_USER, content="x")
    for call in (
        server.stub.Completion(pb.CompletionRequest(prompt="x", adapter="xx")),
        server.stub.Chat(pb.ChatRequest(messages=[message], adapter="xx")),
    ):
        problem = await failure(call)
        assert problem.reason == "INVALID_FIELD"
        assert problem.violations == {"adapter": text}


async def test_details_stay_small_with_the_longest_names(server: Server) -> None:
    names = [chr(ord("a") + i) * 128 for i in range(20)]
    await server.load(adapters=[pb.Adapter(name=name, path="/a") for name in names])
    problem = await failure(
        server.stub.Completion(pb.CompletionRequest(prompt="x", adapter="y" * 5000))
    )
    assert problem.detail_bytes < 2048


def test_no_request_without_an_adapter_can_share_the_entries_of_one() -> None:
    longest = MAX_CACHE_SALT_CHARS
    assert len(SQL.cache_salt("")) > longest
    # Nor can two salts be confused, or two adapters.
    other = replace(SQL, digest="digest of other")
    salts = [each.cache_salt(salt) for each in (SQL, other) for salt in ("", "a", "/", "a" * 128)]
    assert len(set(salts)) == len(salts)
    assert replace(SQL, name="renamed").cache_salt("a") == SQL.cache_salt("a")


def test_a_draft_has_the_salt_of_its_adapter() -> None:
    model = replace(model_info(), adapters=(SQL,))
    request = pb.CompletionRequest(prompt="x", cache_salt="mine", adapter="sql")
    spec = completion_draft(request, model).fit([1], model)
    assert (spec.adapter, spec.cache_policy.salt) == ("sql", SQL.cache_salt("mine"))
    request.adapter = ""
    spec = completion_draft(request, model).fit([1], model)
    assert (spec.adapter, spec.cache_policy.salt) == ("", "mine")


def test_a_model_of_several_ranks_has_no_adapters() -> None:
    unused: Any = None
    leader = LeaderBackend(FakeBackend(), unused, unused)
    leader.check(LoadSpec("m"))
    with pytest.raises(InvalidField, match="several ranks hold"):
        leader.check(LoadSpec("m", adapters=(AdapterSpec("a", str(Path("/a"))),)))
