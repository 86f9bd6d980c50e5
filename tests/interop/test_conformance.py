"""Every scenario with a client in every language, on real servers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from interop.judge import disagreements, problems
from interop.languages import LANGUAGES, SCENARIOS, Json, Language, Run

# The first test waits for builds and runs.
pytestmark = pytest.mark.timeout(3600)


def test_there_is_a_client_in_each_language() -> None:
    names = {"go", "java", "node", "python", "python-aio", "rust"}
    assert {each.name for each in LANGUAGES} == names


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda each: each["name"])
@pytest.mark.parametrize("language", LANGUAGES, ids=lambda each: each.name)
def test_the_client_meets_the_expectations_of_a_scenario(
    need: Callable[[Language], None],
    language: Language,
    scenario: Json,
    request: pytest.FixtureRequest,
) -> None:
    need(language)
    runs: dict[str, Run] = request.getfixturevalue("runs")
    if found := _problems(runs[language.name], scenario):
        pytest.fail(f"{language.name}: {scenario['name']}: {'; '.join(found)}", pytrace=False)


@pytest.mark.parametrize(
    "scenario",
    [each for each in SCENARIOS if each.get("same_in_all_languages")],
    ids=lambda each: each["name"],
)
def test_all_languages_get_the_same_completions(runs: dict[str, Run], scenario: Json) -> None:
    name = scenario["name"]
    sound = {who: run.results[name] for who, run in runs.items() if not _problems(run, scenario)}
    if len(sound) < 2:
        pytest.skip("fewer than two clients can be compared")
    if found := disagreements(scenario, sound):
        pytest.fail(f"{name}: {'; '.join(found)}", pytrace=False)


def _problems(run: Run, scenario: Json) -> list[str]:
    if run.error:
        return [run.error]
    return problems(scenario, run.results.get(scenario["name"]), run.pings)
