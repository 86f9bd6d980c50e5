"""Judge the output of clients; every problem names the step, the expectation and the result."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence

from interop.checks import check
from interop.outcome import Json, Outcome, outcome_of


def read_output(text: str) -> dict[str, list[Json]]:
    """Parse the output of a client into results by scenario.

    Raises:
        ValueError: A line breaks the contract; the message quotes the line.
    """
    results: dict[str, list[Json]] = {}
    for line in text.splitlines():
        try:
            each = json.loads(line)
            name, steps = each["scenario"], list(each["results"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"it printed a line that is not a result: {line[:200]!r}") from error
        if name in results:
            raise ValueError(f"it printed two lines for {name!r}")
        results[name] = steps
    return results


def problems(scenario: Json, results: Sequence[Json] | None, pings: int = 0) -> list[str]:
    """Return the problems in a client's results for a scenario.

    Args:
        scenario: The scenario, as in the file.
        results: The results of the steps; None if the client printed no line.
        pings: The number of pings out of silence that reached the server.
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
    """Return the steps in which clients got different completions.

    Args:
        scenario: The scenario, as in the file.
        results: The results of the steps, by language.
    """
    found = []
    for number, step in enumerate(scenario["steps"]):
        groups = defaultdict(list)
        for language, steps in results.items():
            outcome = outcome_of(scenario, step, steps[number])
            if outcome.is_completion and outcome.messages:
                groups[outcome.text, tuple(outcome.token_ids)].append(language)
        if len(groups) > 1:
            texts = "; ".join(f"{', '.join(who)}: {text!r}" for (text, _), who in groups.items())
            found.append(f"step {number}: not the same in all languages: {texts}")
    return found
