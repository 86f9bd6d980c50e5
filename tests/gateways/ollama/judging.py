"""Comparison of a client's result with the expectations of its scenario."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]

_COUNTS = ("prompt_eval_count", "prompt_eval_duration", "eval_count", "total_duration")


def judge(expected: Json, result: Json) -> None:
    """Assert that a result is what its scenario expects.

    Args:
        expected: The expectations.
        result: ``answer``, ``parts`` or ``error``, as the client has reported it.
    """
    if "status" in expected:
        error = result["error"]
        # The package for Node tells no status of a stream.
        assert error["status"] == expected["status"], result
        assert all(word in error["text"] for word in expected["words"]), result
        return
    assert "error" not in result, result
    parts = result["parts"] if "parts" in result else [result["answer"]]
    whole = parts[-1]
    for name, value in expected.items():
        check = globals()[f"_check_{name}"]
        assert check(value, parts, whole), (name, value, result)


def _text(parts: list[Json]) -> str:
    return "".join(_of(part, "content", "response") for part in parts)


def _of(part: Json, in_message: str, otherwise: str) -> str:
    message = part.get("message")
    found = part.get(otherwise) if message is None else message.get(in_message)
    return found or ""


def _check_text(value: str, parts: list[Json], _whole: Json) -> bool:
    return _text(parts) == value


def _check_begins(value: str, parts: list[Json], _whole: Json) -> bool:
    return _text(parts).startswith(value)


def _check_json(value: Json, parts: list[Json], _whole: Json) -> bool:
    return bool(json.loads(_text(parts)) == value)


def _check_thinking(value: str, parts: list[Json], _whole: Json) -> bool:
    return "".join(_of(part, "thinking", "thinking") for part in parts) == value


def _check_calls(value: list[Any], parts: list[Json], _whole: Json) -> bool:
    functions = [
        call["function"] for part in parts for call in part["message"].get("tool_calls") or []
    ]
    return [[each["name"], each["arguments"]] for each in functions] == value


def _check_done_reason(value: str, _parts: list[Json], whole: Json) -> bool:
    return bool(whole["done"] and whole["done_reason"] == value)


def _check_counted(_value: bool, parts: list[Json], whole: Json) -> bool:
    others = parts[:-1]
    return all(whole[name] > 0 for name in _COUNTS) and not any(part["done"] for part in others)


def _check_eval_count(value: int, _parts: list[Json], whole: Json) -> bool:
    return bool(whole["eval_count"] == value)


def _check_answer(value: Json, _parts: list[Json], whole: Json) -> bool:
    return _contains(whole, value)


def _contains(found: Any, value: Any) -> bool:
    if isinstance(value, dict):
        return all(_contains(found[name], each) for name, each in value.items())
    return bool(found == value)


def _check_logprobs(value: int, parts: list[Json], whole: Json) -> bool:
    entries = [entry for part in parts for entry in part.get("logprobs") or []]
    tops = all(len(entry.get("top_logprobs") or []) == value for entry in entries)
    text = "".join(entry["token"] for entry in entries)
    return tops and len(entries) == whole["eval_count"] and text.startswith(_text(parts))


def _check_vectors(value: list[int], _parts: list[Json], whole: Json) -> bool:
    vectors = whole["embeddings"]
    return [len(each) for each in vectors] == value and all(_unit(vectors))


def _unit(vectors: list[list[float]]) -> Iterator[bool]:
    for vector in vectors:
        yield math.isclose(math.hypot(*vector), 1, rel_tol=1e-6)


def _check_vector(value: int, _parts: list[Json], whole: Json) -> bool:
    return len(whole["embedding"]) == value
