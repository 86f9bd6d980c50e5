"""Holds the outcome of a step against what its scenario expects.

Keys of an expectation, one for each step; all but ``code`` may be left out:

- ``code``: the status, OK if left out; ``reason`` of its details, none if left out;
  ``metadata``, ``violations`` (the names of fields) and ``retry_seconds`` of them;
  ``message_has``: a part of its message.
- ``messages``: how many there were; ``last``: fields of the last one.
- ``text``: the content of all messages (or how long it is), ``text_lacks``: what is not
  in it; ``token_ids``: those of all messages.
- ``logprobs``: how many alternatives each token has; what is told of them must fit.
- ``same_as``, ``differs_from``: another step whose text and tokens are the same, or not.
- ``statuses``, of a step that watched them: fields of the ``last`` one and of one
  ``seen`` on the way; their progress must never fall.
- ``pings``: how many the server saw that came out of silence.

A value is met by its equal; ``{"at_least": N}`` and ``{"above": N}`` by numbers; an
object by one whose fields of those names meet its values. Every completion that
succeeds must also keep the rules of ``runner.proto`` (one message with ``done``, the
last; as many tokens as it says).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from interop.outcome import Json, Outcome
from runner_common.handshake import ERROR_DOMAIN

_NUMBERS: dict[str, Callable[[float, float], bool]] = {
    "at_least": lambda found, bound: found >= bound,
    "above": lambda found, bound: found > bound,
}
_ROUNDING = 1e-3
"""Of the sum of probabilities that came as 32-bit logarithms."""


def check(expected: Json, outcomes: Sequence[Outcome], pings: int) -> Iterator[str]:
    """Tells what is wrong with the last of some outcomes.

    Args:
        expected: The expectation of its step.
        outcomes: Of the steps up to it.
        pings: What the server saw of pings out of silence.
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
        yield from _check_stream(outcome)
        yield from _check_logprobs(expected.get("logprobs"), outcome)
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


def _check_stream(outcome: Outcome) -> Iterator[str]:
    """The rules of every completion."""
    done = [message["done"] for message in outcome.messages]
    if outcome.code != "OK":
        if any(done):
            yield "it failed and has a message with done"
        return
    if sum(done) != 1 or not done[-1]:
        yield f"expected done in the last message alone, got {done}"
        return
    counted, count = outcome.messages[-1]["eval_count"], len(outcome.token_ids)
    if counted != count:
        yield f"eval_count is {counted} and {count} token ids came"


def _check_logprobs(count: int | None, outcome: Outcome) -> Iterator[str]:
    logprobs = [each for message in outcome.messages for each in message["logprobs"]]
    ids = [each["token_id"] for each in logprobs]
    wanted = [] if count is None else outcome.token_ids
    if ids != wanted:
        yield f"expected log probabilities of {wanted}, got of {ids}"
    # Behind a stop string they go on.
    joined = "".join(each["text"] for each in logprobs)
    if wanted and not joined.startswith(outcome.text):
        yield f"expected the texts of tokens to be {outcome.text!r}, got {joined!r}"
    wrong = (list(_check_logprob(each, count)) for each in logprobs)
    yield from next(filter(None, wrong), [])


def _check_logprob(token: Json, count: int | None) -> Iterator[str]:
    tops = [top["logprob"] for top in token["top"]]
    if len(tops) != count or tops != sorted(tops, reverse=True):
        yield f"expected {count} alternatives, most likely first, got {token['top']}"
    if max(token["logprob"], *tops, 0) > 0 or sum(map(math.exp, tops)) > 1 + _ROUNDING:
        yield f"expected logarithms of probabilities, got {token}"
    itself = {key: token[key] for key in ("token_id", "text", "bytes", "logprob")}
    if any(top["token_id"] == token["token_id"] and top != itself for top in token["top"]):
        yield f"expected the same of a token and of it as an alternative, got {token}"
    if tops and token["logprob"] > tops[0]:
        yield f"expected no token more likely than the most likely one, got {token}"


def _compare(key: str, other: Outcome, outcome: Outcome) -> Iterator[str]:
    is_same = (outcome.text, outcome.token_ids) == (other.text, other.token_ids)
    if is_same != (key == "same_as"):
        word = "the same text" if key == "same_as" else "another text"
        yield f"expected {word} as {other.text!r}, got {outcome.text!r}"


def _differences(expected: Any, found: Any, where: str) -> Iterator[str]:
    """Where a value does not meet what is expected of it."""
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
    """A number, also as proto3 JSON writes those of 64 bits and durations."""
    try:
        return float(str(value).removesuffix("s"))
    except ValueError:
        return None
