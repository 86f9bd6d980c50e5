"""Check what ``runner.proto`` says of every stream of a completion or an answer.

``done`` is in the last message alone, and there are as many tokens as ``eval_count`` says. Log
probabilities come for all tokens and those of the prompt, as the request asks, and the texts and
bytes of tokens are the text. ``constraint_satisfied`` is true of the text, by an implementation of
JSON schema and of regular expressions that the server does not use. The calls of tools have ids of
their own, and the arguments are JSON objects; calls that are required are valid by their schemas.
"""

from __future__ import annotations

import json
import math
import re
from base64 import b64decode
from collections.abc import Iterator
from typing import Any

import jsonschema

from interop.outcome import Json, Outcome

_ROUNDING = 1e-3
"""Tolerance for the sum of probabilities that arrive as 32-bit logarithms."""


def check_stream(expected: Json, outcome: Outcome) -> Iterator[str]:
    """Yield the problems of a stream.

    Args:
        expected: The expectation of its step.
        outcome: The outcome of a completion or an answer.
    """
    done = [message["done"] for message in outcome.messages]
    if outcome.code != "OK":
        if any(done):
            yield "the call failed, but has a message with done"
        return
    if sum(done) != 1 or not done[-1]:
        yield f"expected done in the last message alone, got {done}"
        return
    counted, count = outcome.messages[-1]["eval_count"], len(outcome.token_ids)
    if counted != count:
        yield f"eval_count is {counted}, but {count} token ids came"
    yield from _check_logprobs(expected.get("logprobs"), outcome)
    yield from _check_prompt_logprobs(outcome)
    yield from _check_constraint(outcome)
    if outcome.is_answer:
        yield from _check_answer(expected, outcome)


def _check_logprobs(count: int | None, outcome: Outcome) -> Iterator[str]:
    logprobs = outcome.joined("logprobs")
    ids = [each["token_id"] for each in logprobs]
    wanted = [] if count is None else outcome.token_ids
    if ids != wanted:
        yield f"expected log probabilities of {wanted}, got of {ids}"
    if wanted and not outcome.is_answer:
        yield from _check_texts(logprobs, outcome.text)
    candidates = outcome.call["request"].get("logprob_token_ids", [])
    wrong = (list(_check_logprob(each, count, candidates)) for each in logprobs)
    yield from next(filter(None, wrong), [])


def _check_texts(logprobs: list[Json], text: str) -> Iterator[str]:
    # Log probabilities continue after a stop string, the text does not.
    joined = "".join(each["text"] for each in logprobs)
    if not joined.startswith(text):
        yield f"expected the texts of tokens to be {text!r}, got {joined!r}"
    data = b"".join(b64decode(each["bytes"]) for each in logprobs)
    if not data.decode(errors="replace").startswith(text):
        yield f"expected the bytes of tokens to be {text!r}, got {data!r}"


def _check_logprob(token: Json, count: int | None, candidates: list[int]) -> Iterator[str]:
    tops = [top["logprob"] for top in token["top"]]
    if len(tops) != count or tops != sorted(tops, reverse=True):
        yield f"expected {count} alternatives, most likely first, got {token['top']}"
    if max(token["logprob"], *tops, 0) > 0 or sum(map(math.exp, tops)) > 1 + _ROUNDING:
        yield f"expected logarithms of probabilities, got {token}"
    if (asked := [each["token_id"] for each in token["candidates"]]) != candidates:
        yield f"expected candidates {candidates}, got {asked}"
    itself = {key: token[key] for key in ("token_id", "text", "bytes", "logprob")}
    others = token["top"] + token["candidates"]
    if any(other["token_id"] == token["token_id"] and other != itself for other in others):
        yield f"expected the same of a token and of it as an alternative, got {token}"
    if tops and max(other["logprob"] for other in [token, *others]) > tops[0]:
        yield f"expected no token more likely than the most likely one, got {token}"


def _check_prompt_logprobs(outcome: Outcome) -> Iterator[str]:
    logprobs = outcome.joined("prompt_logprobs")
    request = outcome.call["request"]
    if (count := request.get("prompt_logprobs")) is None:
        if logprobs:
            yield f"expected no log probabilities of the prompt, got {logprobs}"
        return
    wanted = outcome.messages[-1]["prompt_eval_count"] - 1
    if len(logprobs) != wanted:
        yield f"expected log probabilities of {wanted} tokens of the prompt, got {len(logprobs)}"
    joined = "".join(each["text"] for each in logprobs)
    if not request["prompt"].endswith(joined):
        yield f"expected the texts of the prompt {request['prompt']!r}, got {joined!r}"
    wrong = (list(_check_logprob(each, count, [])) for each in logprobs)
    yield from next(filter(None, wrong), [])


def _check_constraint(outcome: Outcome) -> Iterator[str]:
    constraint = outcome.call["request"].get("constraint")
    said = outcome.messages[-1].get("constraint_satisfied")
    if not constraint and not _requires_calls(outcome) and said is not None:
        yield f"expected no constraint_satisfied, got {said}"
    for kind in constraint or ():
        if kind in _OBEYS and said != (obeys := _OBEYS[kind](constraint[kind], outcome.text)):
            yield f"expected constraint_satisfied {obeys}, got {said}, of {outcome.text!r}"


def _is_valid(schema: str, text: str) -> bool:
    """Return whether a text is a JSON value that is valid by a schema."""
    try:
        jsonschema.validate(json.loads(text), json.loads(schema))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


_OBEYS: dict[str, Any] = {
    "json_schema": _is_valid,
    "json_object": lambda _, text: _is_valid('{"type": "object"}', text),
    "regex": lambda pattern, text: re.fullmatch(pattern, text) is not None,
    "choice": lambda choice, text: text in choice["texts"],
}
"""By kind of constraint, a function of constraint and text."""


def _check_answer(expected: Json, outcome: Outcome) -> Iterator[str]:
    reasoning = "".join(message["reasoning"] for message in outcome.messages)
    if reasoning != expected.get("reasoning", ""):
        yield f"reasoning: expected {expected.get('reasoning', '')!r}, got {reasoning!r}"
    last = outcome.messages[-1]
    # A model may end its reasoning as soon as it has begun.
    if not bool(reasoning) <= last["reasoning_eval_count"] <= last["eval_count"]:
        counted = last["reasoning_eval_count"]
        yield f"reasoning_eval_count is {counted}, with the reasoning {reasoning!r}"
    calls = outcome.joined("tool_calls")
    yield from _check_tool_calls(expected.get("tool_calls", []), calls)
    if _requires_calls(outcome):
        yield from _check_required_calls(calls, outcome)


def _requires_calls(outcome: Outcome) -> bool:
    """Return whether a request demands a call of a tool."""
    return bool(outcome.call["request"].get("tool_choice") == "TOOL_CHOICE_REQUIRED")


def _check_required_calls(calls: list[Json], outcome: Outcome) -> Iterator[str]:
    """Yield the problems of an answer that had to be calls of tools by their schemas."""
    request = outcome.call["request"]
    wanted = request.get("tool_name")
    schemas = {
        tool["name"]: tool.get("parameters", "{}")
        for tool in request["tools"]
        if tool["name"] == (wanted or tool["name"])
    }
    obeys = [
        call["name"] in schemas and _is_valid(schemas[call["name"]], call["arguments"])
        for call in calls
    ]
    is_whole = bool(calls) and not outcome.text
    said = outcome.messages[-1].get("constraint_satisfied")
    if not all(obeys) or said != is_whole:
        yield f"expected calls by the tools' schemas, got {calls} and {said} of {outcome.text!r}"


def _check_tool_calls(expected: list[Json], calls: list[Json]) -> Iterator[str]:
    try:
        found = [
            {"name": call["name"], "arguments": json.loads(call["arguments"])} for call in calls
        ]
    except ValueError as error:
        yield f"arguments are no JSON: {error}: {calls}"
        return
    if found != expected:
        yield f"tool calls: expected {expected}, got {found}"
    ids = {call["id"] for call in calls}
    if "" in ids or len(ids) < len(calls):
        yield f"expected an id for every call, got {calls}"
