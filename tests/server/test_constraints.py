"""Constraints of requests on the fake: refusals, and constraints in the engine."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.contract import CONSTRAINT_KINDS
from runner_server.engine.types import Constraint, NoLegalToken
from runner_server.engine.work import DecodeItem, WorkItem, WorkReport
from runner_server.errors import InvalidField
from support.fakes import FakeExecutor, FakeGrammar, says
from support.harness import Server, failure

SIZE = 65_536
KINDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "json_schema": ({"json_schema": "{}"}, ("{}",)),
    "json_object": ({"json_object": pb.JsonObject()}, ()),
    "regex": ({"regex": "a" * SIZE}, ("a" * SIZE,)),
    "lark": ({"lark": 'start: "é"'}, ('start: "é"',)),
    "choice": ({"choice": pb.Choice(texts=["x"] * 1024)}, ("x",) * 1024),
}
BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "constraint"),
    ({"json_schema": ""}, "constraint.json_schema"),
    ({"regex": "a" * (SIZE + 1)}, "constraint.regex"),
    ({"lark": "é" * (SIZE // 2 + 1)}, "constraint.lark"),
    ({"choice": pb.Choice()}, "constraint.choice.texts"),
    ({"choice": pb.Choice(texts=["x"] * 1025)}, "constraint.choice.texts"),
    ({"choice": pb.Choice(texts=["x", ""])}, "constraint.choice.texts[1]"),
    ({"choice": pb.Choice(texts=["x" * SIZE, "y"])}, "constraint.choice.texts"),
]


def test_every_kind_is_in_the_contract() -> None:
    assert [field.name for field in pb.Constraint.DESCRIPTOR.fields] == list(CONSTRAINT_KINDS)
    names = [f"CONSTRAINT_KIND_{kind.upper()}" for kind in ("unspecified", *CONSTRAINT_KINDS)]
    assert pb.ConstraintKind.keys() == names


@pytest.mark.parametrize("kind", CONSTRAINT_KINDS)
async def test_a_constraint_reaches_the_engine(loaded: Server, kind: str) -> None:
    fields, texts = KINDS[kind]
    messages = await loaded.complete(constraint=pb.Constraint(**fields), num_predict=2)
    assert messages[-1].constraint_satisfied
    assert loaded.backend.grammars.compiled == [Constraint(kind, texts)]
    assert [type(each) for each in loaded.backend.matchers] == [FakeGrammar]


async def test_without_a_constraint_nothing_is_compiled_or_told(loaded: Server) -> None:
    messages = await loaded.complete(num_predict=2)
    assert not messages[-1].HasField("constraint_satisfied")
    assert not loaded.backend.grammars.compiled
    assert loaded.backend.matchers == [None]


@pytest.mark.parametrize(("fields", "place"), BAD, ids=lambda each: str(each)[:40])
async def test_a_constraint_out_of_range_is_refused(
    loaded: Server, fields: dict[str, Any], place: str
) -> None:
    problem = await failure(loaded.start(constraint=pb.Constraint(**fields)))
    assert (problem.code, problem.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert set(problem.violations) == {place}
    assert not loaded.backend.grammars.compiled


@pytest.mark.parametrize("option", [{"ignore_eos": True}, {"min_predict": 2}], ids=str)
async def test_a_constraint_is_refused_with_options_that_move_the_end(
    loaded: Server, option: dict[str, Any]
) -> None:
    problem = await failure(loaded.start(constraint=pb.Constraint(regex="a"), **option))
    assert set(problem.violations) == {f"options.{name}" for name in option}


async def test_a_constraint_that_cannot_be_compiled_is_refused(loaded: Server) -> None:
    loaded.backend.grammars.failure = InvalidField([("constraint.regex", "at 3: no")])
    problem = await failure(loaded.start(constraint=pb.Constraint(regex="a(?=b)")))
    assert problem.violations == {"constraint.regex": "at 3: no"}
    assert loaded.backend.steps == 0
    await loaded.assert_nothing_left()


@pytest.mark.parametrize(("stop", "satisfied"), [("!", False), ("d!", True)])
async def test_a_text_cut_by_a_stop_string_is_judged_as_it_is_shown(
    loaded: Server, stop: str, satisfied: bool
) -> None:
    loaded.backend.reply = says("bad!")
    last = (await loaded.complete(constraint=pb.Constraint(regex="x"), stop=[stop]))[-1]
    assert last.stop_match == stop
    assert last.constraint_satisfied == satisfied


async def test_a_row_without_a_legal_token_fails_by_name(
    loaded: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeExecutor.run

    def stuck(self: FakeExecutor, item: WorkItem) -> WorkReport:
        report = run(self, item)
        if not isinstance(item, DecodeItem) or loaded.backend.steps < 4:
            return report
        first, *others = report.events
        return WorkReport(0.01, events=(NoLegalToken(first.row, "it is stuck"), *others))

    monkeypatch.setattr(FakeExecutor, "run", stuck)
    problem = await failure(loaded.start(constraint=pb.Constraint(regex="x"), num_predict=50))
    assert (problem.code, problem.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert problem.violations["constraint"].endswith("it is stuck")
    await loaded.assert_nothing_left()
    assert not (await loaded.status()).last_error
