"""Judges what clients printed; every complaint says which step, what was expected, what came."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence

from interop.checks import check
from interop.outcome import Json, Outcome, outcome_of


def read_output(text: str) -> dict[str, list[Json]]:
    """Reads the lines that a client printed: results by scenario.

    Raises:
        ValueError: A line is none of the contract's; the message quotes it.
    """
    results: dict[str, list[Json]] = {}
    for line in text.splitlines():
        try:
            each = json.loads(line)
            name, steps = each["scenario"], list(each["results"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"it printed a line that is no result: {line[:200]!r}") from error
        if name in results:
            raise ValueError(f"it printed two lines for {name!r}")
        results[name] = steps
    return results


def problems(scenario: Json, results: Sequence[Json] | None, pings: int = 0) -> list[str]:
    """What is wrong with a client's line for a scenario; nothing if all is well.

    Args:
        scenario: As the file has it.
        results: Of its steps; None if the client printed no line.
        pings: What the server saw of them.
    """
    if results is None:
        return ["it printed no line for this scenario"]
    if len(results) != len(scenario["steps"]):
        return [f"expected {len(scenario['steps'])} results, one a step; got {len(results)}"]
    outcomes: list[Outcome] = []
    for number, (step, result) in enumerate(zip(scenario["steps"], results, strict=True)):
        where = f"step {number}, {step['op']} {step.get('rpc') or step.get('of') or ''}".strip()
        try:
            outcomes.append(outcome_of(scenario, step, result))
        except ValueError as error:
            return [f"{where}: {error}"]
        if found := list(check(scenario["expect"][number], outcomes, pings)):
            return [f"{where}: {each}" for each in found]
    return []


def disagreements(scenario: Json, results: Mapping[str, Sequence[Json]]) -> list[str]:
    """Where clients got other completions than each other; nothing if all got the same.

    Args:
        scenario: As the file has it.
        results: Of its steps, by language.
    """
    found = []
    for number, step in enumerate(scenario["steps"]):
        groups = defaultdict(list)
        for language, steps in results.items():
            outcome = outcome_of(scenario, step, steps[number])
            if outcome.is_completion and outcome.messages:
                groups[outcome.text, tuple(outcome.token_ids)].append(language)
        if len(groups) > 1:
            said = "; ".join(f"{', '.join(who)}: {text!r}" for (text, _), who in groups.items())
            found.append(f"step {number}: not the same in all languages: {said}")
    return found
