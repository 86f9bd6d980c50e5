"""Scenarios and results of clients for tests of the judge."""

from __future__ import annotations

import copy
from typing import Any

Json = dict[str, Any]


def call(rpc: str, **more: Any) -> Json:
    """Return a step that calls an rpc."""
    return {"op": "call", "rpc": rpc, "request": {}} | more


def scenario(steps: list[Json], *expect: Json) -> Json:
    """Return a scenario with the expectations of its steps."""
    return {"name": "s", "server": "plain", "steps": steps, "expect": list(expect)}


def changed(answer: Json, *path: str | int, to: Any) -> Json:
    """Return a copy of an answer with one value replaced."""
    answer = copy.deepcopy(answer)
    part: Any = answer
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = to
    return answer
