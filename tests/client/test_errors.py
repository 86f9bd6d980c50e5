"""The exception tree: the drawing in the docstring, and the attributes of each class."""

from __future__ import annotations

import inspect
import pickle
import re

import grpc
import pytest

from runner_client import errors

CLASSES = {
    name: member
    for name, member in vars(errors).items()
    if inspect.isclass(member) and issubclass(member, errors.RunnerError)
}


def parents_in_docstring() -> dict[str, str]:
    """Return the tree in the module's docstring as parents by class name."""
    parents: dict[str, str] = {}
    path = [(-1, "Exception")]
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"([ \u2502\u251c\u2514\u2500]*)(\w+Error)\b", line)
        if match and (line.startswith("    RunnerError") or "\u2500" in line):
            depth, name = len(match[1]), match[2]
            while path[-1][0] >= depth:
                path.pop()
            parents[name] = path[-1][1]
            path.append((depth, name))
    return parents


def test_the_tree_matches_its_docstring() -> None:
    assert parents_in_docstring() == {
        name: kind.__bases__[0].__name__ for name, kind in CLASSES.items()
    }


@pytest.mark.parametrize("kind", CLASSES.values())
def test_every_member_has_reason_code_and_metadata(kind: type[errors.RunnerError]) -> None:
    plain = kind("what happened")
    assert str(plain) == "what happened"
    assert (plain.reason, plain.code, plain.metadata) == (None, None, {})
    code = grpc.StatusCode.INTERNAL
    full = kind("what happened", reason="BUSY", code=code, metadata={"a": "1"})
    assert (full.reason, full.code, full.metadata) == ("BUSY", code, {"a": "1"})


@pytest.mark.parametrize("kind", CLASSES.values())
def test_every_member_can_be_pickled(kind: type[errors.RunnerError]) -> None:
    error = kind("what happened", reason="BUSY", metadata={"a": "1"})
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(copy) is kind
    assert (str(copy), vars(copy)) == (str(error), vars(error))


@pytest.mark.parametrize("kind", CLASSES.values())
def test_every_member_is_documented(kind: type[errors.RunnerError]) -> None:
    assert kind.__doc__
    assert "__doc__" in vars(kind)


def test_subclasses_have_their_own_attributes() -> None:
    invalid = errors.InvalidRequestError("x", field_violations=[("a", "b")])
    assert invalid.field_violations == (("a", "b"),)
    long = errors.PromptTooLongError("x", prompt_tokens=3, context_length=2)
    assert (long.prompt_tokens, long.context_length) == (3, 2)
    assert errors.ModelNotFoundError("x", model="m").model == "m"
    memory = errors.LoadRequiresFullError(
        "x", required_bytes=3, available_bytes=2, overhead_bytes=1
    )
    assert (memory.required_bytes, memory.available_bytes, memory.overhead_bytes) == (3, 2, 1)
    assert errors.QueueFullError("x", retry_delay_seconds=0.5).retry_delay_seconds == 0.5
    timeout = errors.RunnerTimeoutError("x", phase="idle", timeout_seconds=9)
    assert (timeout.phase, timeout.timeout_seconds) == ("idle", 9)
    gone = errors.RunnerExitedError("x", exit_code=-9, exit_reason="y", stderr_tail=["z"])
    assert (gone.exit_code, gone.exit_reason, gone.stderr_tail) == (-9, "y", ("z",))
