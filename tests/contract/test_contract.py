"""The error table of ``runner_common.contract`` against everything that states it."""

from __future__ import annotations

import re
from pathlib import Path

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import errors
from runner_common.contract import CODES, ERRORS
from runner_server.errors import RunnerFault

ROOT = Path(__file__).parents[2]


def test_every_reason_of_the_protocol_has_a_rule() -> None:
    reasons = [name.removeprefix("ERROR_REASON_") for name in pb.ErrorReason.keys()[1:]]
    assert sorted(rule.reason for rule in ERRORS) == sorted(reasons)


def test_the_comments_of_the_protocol_name_the_codes() -> None:
    text = (ROOT / "proto/mlxrunner/v1/runner.proto").read_text(encoding="utf-8")
    enum = text.partition("enum ErrorReason {")[2].partition("\n}")[0]
    documented: dict[str, str] = {}
    for comment, name in re.findall(r"((?: *//.*\n)+) *ERROR_REASON_(\w+) =", enum):
        if code := re.search(r"Code ([A-Z_]+)", re.sub(r"\n *//", "", comment)):
            documented[name] = code[1]
    assert documented == CODES


def test_every_rule_has_a_fault_and_an_exception() -> None:
    faults = {pb.ErrorReason.Name(each.reason): each for each in RunnerFault.__subclasses__()}
    for rule in ERRORS:
        assert faults[f"ERROR_REASON_{rule.reason}"].code.name == rule.code
        assert issubclass(getattr(errors, rule.exception), errors.RunnerError)


def test_the_table_of_the_guide_is_the_contract() -> None:
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    rows = [
        f"| {rule.code} | {rule.reason} | {rule.when} | {rule.remedy} | `{rule.exception}` |"
        for rule in ERRORS
    ]
    assert "\n".join(rows) in page
