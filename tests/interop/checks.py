"""Compare the outcome of a step with the expectation of its scenario.

Keys of an expectation, one for each step; each may be left out:

- ``code``: the status code, by default OK; ``message_has``: a part of the status message.
- ``reason``: the reason in the error details, by default no details at all; with it ``metadata``,
  ``violations`` (names of fields) and ``retry_seconds``.
- ``messages``: the number of messages; ``last``: fields of the last one.
- ``text``: the content of all messages, or its length; ``text_lacks``: a string that must not
  occur in the content; ``token_ids``: the token ids of all messages.
- ``logprobs``: the number of alternatives for each token; the probabilities must be consistent.
- ``reasoning``: the reasoning of all messages, by default none; ``tool_calls``: the calls of all
  messages with parsed ``arguments``, by default none.
- ``same_as``, ``differs_from``: the index of a step whose text and tokens are the same, or not.
- ``statuses``, for a step with ``watch_status``: fields of the ``last`` one and of one ``seen``
  on the way; their progress must never fall.
- ``pings``: the number of pings out of silence that reached the server.

A value matches its equal. ``{"at_least": N}`` and ``{"above": N}`` match numbers. An object matches
one with matching values for these fields. Every completion and answer must also keep the rules of
``runner.proto`` that ``stream_checks`` knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from interop.outcome import Json, Outcome
from interop.stream_checks import check_stream
from runner_common.contract import ERROR_DOMAIN

_NUMBERS: dict[str, Callable[[float, float], bool]] = {
    "at_least": lambda found, bound: found >= bound,
    "above": lambda found, bound: found > bound,
}


def check(expected: Json, outcomes: Sequence[Outcome], pings: int) -> Iterator[str]:
    """Yield the problems of the last outcome.

    Args:
        expected: The expectation of that step.
        outcomes: The outcomes of the steps up to and including that step.
        pings: The number of pings out of silence that reached the server.
    """
    outcome = outcomes[-1]
    if outcome.step["op"] == "start":
        return
    code = expected.get("code", "OK")
    if outcome.code != code:
        yield f"expected {code}, got {outcome.code}: {outcome.message} {outcome.details or ''}"
        return
    yield from _check_details(expected, outcome)
    if outcome.step["op"] == "until_status":
        yield from _differences(outcome.step["fields"], outcome.last, "status")
    yield from _check_messages(expected, outcome)
    yield from _check_statuses(expected.get("statuses", {}), outcome)
    if outcome.is_completion:
        yield from check_stream(expected, outcome)
    for key in expected.keys() & {"same_as", "differs_from"}:
        yield from _compare(key, outcomes[expected[key]], outcome)
    if "pings" in expected:
        yield from _differences(expected["pings"], pings, "pings out of silence")


def _check_details(expected: Json, outcome: Outcome) -> Iterator[str]:
    details = dict(outcome.details)
    if outcome.code != "OK" and not outcome.message:
        yield "the status has no message"
    if expected.get("message_has", "") not in outcome.message:
        yield f"expected {expected['message_has']!r} in the message, got {outcome.message!r}"
    if "reason" not in expected:
        if details:
            yield f"expected no details, got {details}"
        return
    details["violations"] = [each.get("field") for each in details.get("violations", ())]
    wanted = {
        "reason": expected["reason"],
        "domain": ERROR_DOMAIN,
        "violations": expected.get("violations", []),
        "retry_seconds": expected.get("retry_seconds"),
    }
    if "metadata" in expected:
        wanted["metadata"] = expected["metadata"]
    yield from _differences(wanted, details, "details")


def _check_messages(expected: Json, outcome: Outcome) -> Iterator[str]:
    if "messages" in expected:
        yield from _differences(expected["messages"], len(outcome.messages), "messages")
    if "last" in expected:
        yield from _differences(expected["last"], outcome.last, "last message")
    if "text" in expected:
        is_length = isinstance(expected["text"], dict)
        found = len(outcome.text) if is_length else outcome.text
        yield from _differences(expected["text"], found, "text")
    if "text_lacks" in expected and expected["text_lacks"] in outcome.text:
        yield f"expected no {expected['text_lacks']!r} in the text, got {outcome.text!r}"
    if "token_ids" in expected:
        yield from _differences(expected["token_ids"], outcome.token_ids, "token ids")


def _check_statuses(expected: Json, outcome: Outcome) -> Iterator[str]:
    if not expected:
        return
    if not outcome.statuses:
        yield "expected statuses, got none"
        return
    yield from _differences(expected["last"], outcome.statuses[-1], "last status")
    if all(list(_differences(expected["seen"], each, "")) for each in outcome.statuses):
        yield f"no status of {len(outcome.statuses)} was {expected['seen']}"
    progress = [status["progress"] for status in outcome.statuses]
    if any(later < earlier for earlier, later in pairwise(progress)):
        yield f"expected progress that rises, got {progress}"


def _compare(key: str, other: Outcome, outcome: Outcome) -> Iterator[str]:
    is_same = (outcome.text, outcome.token_ids) == (other.text, other.token_ids)
    if is_same != (key == "same_as"):
        word = "the same text" if key == "same_as" else "another text"
        yield f"expected {word} as {other.text!r}, got {outcome.text!r}"


def _differences(expected: Any, found: Any, where: str) -> Iterator[str]:
    """Yield the differences between a value and an expectation."""
    if isinstance(expected, dict) and expected.keys() & _NUMBERS.keys():
        for bound, value in expected.items():
            number = _number(found)
            if number is None or not _NUMBERS[bound](number, value):
                yield f"{where}: expected {bound.replace('_', ' ')} {value}, got {found!r}"
    elif isinstance(expected, dict) and isinstance(found, dict):
        for key, value in expected.items():
            yield from _differences(value, found.get(key), f"{where}: {key}")
    elif expected != found and not (isinstance(expected, int) and _number(found) == expected):
        yield f"{where}: expected {expected!r}, got {found!r}"


def _number(value: Any) -> float | None:
    """Return a number, which proto3 JSON may write as a string; a duration in seconds."""
    try:
        return float(str(value).removesuffix("s"))
    except ValueError:
        return None
