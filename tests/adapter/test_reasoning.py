"""Reasoning of real models: its limit, and constraints that begin after it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.chat.format import AnswerFormat
from support.chat_answers import HELLO, answer
from support.chat_models import PADDED, TEMPLATE, add_chat, serving
from support.harness import Server, StartServer, failure
from support.models import VOCAB_SIZE
from support.sweeps import diagonal, sampled

pytestmark = [pytest.mark.mlx, pytest.mark.asyncio(loop_scope="module")]

Build = Callable[..., Path]
BEGIN, END, EOS = VOCAB_SIZE, VOCAB_SIZE + 1, 0
CHOICE = pb.Constraint(choice=pb.Choice(texts=["left§", "right§"]))

SORTS: dict[str, tuple[list[str], bool]] = {
    "think": (["<think>", "</think>"], False),
    "special": (["<think>", "</think>"], True),
    "several tokens": (["<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"], True),
}


@pytest_asyncio.fixture(
    params=sampled(SORTS, ["think", "several tokens"]), scope="module", loop_scope="module"
)
async def reasoning(
    request: pytest.FixtureRequest,
    module_socket_dir: Path,
    model_dir: Build,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Server]:
    """A server with a model that has markers of reasoning."""
    tokens, special = SORTS[request.param]
    path = tmp_path_factory.mktemp("reasoning") / "model"
    model = add_chat(model_dir(**PADDED), path, tokens, special=special)
    async with serving(module_socket_dir, model) as server:
        yield server


@pytest.mark.parametrize(("budget", "seed"), diagonal([0, 1, 9], range(3)))
async def test_a_constraint_begins_after_the_reasoning(
    reasoning: Server, budget: int, seed: int
) -> None:
    # The end of the text would be drawn at once, and must not be.
    bias = {BEGIN: 80.0, EOS: 100.0}
    found = await answer(reasoning, bias, constraint=CHOICE, reasoning_budget=budget, seed=seed)
    assert found.content in ("left§", "right§")
    assert found.last.constraint_satisfied
    assert found.last.done_reason == pb.DONE_REASON_STOP
    begin = await reasoning.stub.Tokenize(pb.TokenizeRequest(content=begin_of(reasoning)))
    end = await reasoning.stub.Tokenize(pb.TokenizeRequest(content=end_of(reasoning)))
    inside = found.ids[len(begin.token_ids) :]
    assert found.ids[: len(begin.token_ids)] == begin.token_ids
    assert inside[budget : budget + len(end.token_ids)] == end.token_ids
    # Of the marker before it, the token that completes it.
    assert found.last.reasoning_eval_count == 1 + budget + len(end.token_ids)
    assert bool(found.reasoning) == (budget > 0)


def begin_of(server: Server) -> str:
    """Return the marker before reasoning."""
    return chat_of(server).think_start


def end_of(server: Server) -> str:
    """Return the marker after reasoning."""
    return chat_of(server).think_end


def chat_of(server: Server) -> AnswerFormat:
    """Return the answer format of the loaded model."""
    model = server.app.engine.state().model
    assert model
    return model.chat.answer


async def test_without_reasoning_a_constraint_begins_at_once(reasoning: Server) -> None:
    for seed in range(4):
        found = await answer(reasoning, {BEGIN: -100.0}, constraint=CHOICE, seed=seed)
        assert (found.content, found.reasoning) in {("left§", ""), ("right§", "")}
        assert found.last.constraint_satisfied
        assert found.last.reasoning_eval_count == 0


async def test_reasoning_that_is_cut_off_satisfies_nothing(reasoning: Server) -> None:
    found = await answer(reasoning, {BEGIN: 80.0}, constraint=CHOICE, num_predict=12)
    assert found.last.done_reason == pb.DONE_REASON_LENGTH
    assert found.last.HasField("constraint_satisfied")
    assert not found.last.constraint_satisfied
    assert found.content == ""


async def test_a_stop_string_is_judged_without_the_reasoning(reasoning: Server) -> None:
    fields: dict[str, Any] = {"constraint": CHOICE, "reasoning_budget": 3, "seed": 1}
    whole = (await answer(reasoning, {BEGIN: 80.0}, **fields)).content
    cut = await answer(reasoning, {BEGIN: 80.0}, stop=[whole[-1]], **fields)
    assert (cut.content, cut.last.constraint_satisfied) == (whole[:-1], False)
    digits = fields | {"constraint": pb.Constraint(regex="[1-4]{2}(;[1-4]{2})*")}
    cut = await answer(reasoning, {BEGIN: 80.0, EOS: -100.0}, stop=[";"], **digits)
    assert (cut.last.stop_match, cut.last.constraint_satisfied) == (";", True)
    assert re.fullmatch("[1-4]{2}", cut.content)


async def test_a_batch_gives_the_answers_of_rows_alone(reasoning: Server) -> None:
    fields: list[dict[str, Any]] = [
        {"bias": {BEGIN: 80.0}, "constraint": CHOICE, "reasoning_budget": 7, "seed": 1},
        {"bias": {BEGIN: 80.0}, "reasoning_budget": 3, "seed": 2},
        {"bias": {}, "constraint": CHOICE, "seed": 3},
        {"bias": {}, "seed": 4},
    ]
    alone = [(await answer(reasoning, **each)).parts for each in fields]
    together = await asyncio.gather(*(answer(reasoning, **each) for each in fields))
    assert [each.parts for each in together] == alone


async def test_a_budget_that_is_not_used_up_changes_nothing(reasoning: Server) -> None:
    bias = {BEGIN: 6.0, END: 6.0}
    plain = await asyncio.gather(*(answer(reasoning, bias, seed=seed) for seed in range(6)))
    budgets = [max(found.last.reasoning_eval_count, 1) + 60 for found in plain]
    budgeted = await asyncio.gather(
        *(answer(reasoning, bias, seed=i, reasoning_budget=n) for i, n in enumerate(budgets))
    )
    assert [found.parts for found in budgeted] == [found.parts for found in plain]


async def test_reasoning_that_begins_again_shares_the_budget(reasoning: Server) -> None:
    # A model that always wants to reason.
    begin = await reasoning.stub.Tokenize(pb.TokenizeRequest(content=begin_of(reasoning)))
    if len(begin.token_ids) > 1:
        pytest.skip("one bias cannot make a model write several tokens in order")
    found = await answer(reasoning, {BEGIN: 80.0}, reasoning_budget=4, num_predict=20)
    end = [END]
    assert found.ids[:6] == [BEGIN] * 5 + end
    assert found.ids[6:12] == [BEGIN, END] * 3
    assert found.last.reasoning_eval_count == 20


@pytest.mark.parametrize("budget", [0, 5])
async def test_a_template_may_open_the_reasoning(
    socket_dir: Path, model_dir: Build, tmp_path: Path, budget: int
) -> None:
    model = add_chat(
        model_dir(**PADDED),
        tmp_path / "model",
        ["<think>", "</think>"],
        special=False,
        template=f"{TEMPLATE}<think>\n",
    )
    async with serving(socket_dir, model) as server:
        found = await answer(server, {EOS: 100.0}, constraint=CHOICE, reasoning_budget=budget)
        assert found.ids[budget] == END
        assert found.content in ("left§", "right§")
        assert found.last.reasoning_eval_count == budget + 1
        # Without a limit, the model ends its reasoning itself.
        free = await answer(server, {END: 7.0, EOS: 100.0}, constraint=CHOICE, num_predict=400)
        assert free.content in ("left§", "right§")
        assert free.last.constraint_satisfied
        assert free.ids[free.last.reasoning_eval_count - 1] == END


async def test_a_limit_is_refused_without_markers(
    socket_dir: Path, model_dir: Build, tmp_path: Path
) -> None:
    model = add_chat(model_dir(**PADDED), tmp_path / "model", [], special=False)
    async with serving(socket_dir, model) as server:
        request = pb.ChatRequest(messages=[HELLO], reasoning_budget=5)
        problem = await failure(server.stub.Chat(request))
        assert (problem.reason, set(problem.violations)) == ("INVALID_FIELD", {"reasoning_budget"})


WRONG: list[dict[str, Any]] = [
    {"reasoning_budget": -1},
    {
        "reasoning_budget": 1,
        "options": pb.CompletionOptions(min_predict=1, stop_token_ids=[1], num_predict=9),
    },
]


@pytest.mark.asyncio(loop_scope="function")
@pytest.mark.parametrize("fields", WRONG, ids=["negative", "an end that is excluded"])
async def test_a_wrong_limit_is_refused(start_server: StartServer, fields: dict[str, Any]) -> None:
    from support.fakes import CHAT_TEMPLATE, THINKING, FakeBackend, chat_format

    server = await start_server(FakeBackend(chat=chat_format(CHAT_TEMPLATE, answer=THINKING)))
    await server.load()
    problem = await failure(server.stub.Chat(pb.ChatRequest(messages=[HELLO], **fields)))
    assert set(problem.violations) == {"reasoning_budget"}
