"""The examples in every language run, and print the same text."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from interop.languages import EXAMPLES, Failed, Language, run
from interop.servers import DEMO_MODEL, ROOT, Server
from runner_client import ChatMessage, JsonSchema, Options, RunnerClient

# The first run of an example builds it.
pytestmark = pytest.mark.timeout(1800)

PROMPT, OPTIONS = "def fibonacci(n):", Options(temperature=0, num_predict=64)
MESSAGE = "Ada is 36 years old and has a cat."
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 2},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
SPAWN = {"go", "go-pool", "node", "node-pool", "python"}
COMPLETE = {"java", "rust"}
EXTRACT = {"go-record", "node-record"}
CALL = COMPLETE | EXTRACT
MOST_LINES = 59
SOURCES = {".go", ".java", ".js", ".py", ".rs"}

_SECONDS = 1200.0
"""Limit of a run, which includes the build."""
_GONE_SECONDS = 10.0
_MARK = "MLX_RUNNER_TEST"
"""Environment variable that marks the processes of a test."""
_EXAMPLES = [Language(each.parent.name) for each in sorted(EXAMPLES.glob("*/run"))]
_COMPLETING = [each for each in _EXAMPLES if each.name not in EXTRACT]
_EXTRACTING = [each for each in _EXAMPLES if each.name in EXTRACT]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Copy what an example needs, without build outputs; yield the folder of the copy.

    The packages that the example for Rust depends on are compiled once, with those of the client.
    """
    folder = tmp_path_factory.mktemp("checkout")
    for file in _source_files("examples", "proto", "third_party"):
        copy = folder / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARGO_TARGET_DIR", str(ROOT / "examples/rust/target"))
        yield folder


@pytest.fixture(scope="module")
def expected(servers: dict[str, Server]) -> str:
    """Return the completion of the Python client."""
    with RunnerClient(servers["plain"].address) as client:
        return client.complete(PROMPT, options=OPTIONS).content


def test_there_is_an_example_in_each_language() -> None:
    assert {each.name for each in _EXAMPLES} == SPAWN | CALL


@pytest.mark.parametrize("language", _COMPLETING, ids=lambda each: each.name)
def test_the_example_builds_itself_and_prints_the_completion(
    need: Callable[[Language], None],
    language: Language,
    servers: dict[str, Server],
    checkout: Path,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need(language.toolchain)
    where = str(DEMO_MODEL) if language.name in SPAWN else servers["plain"].address
    monkeypatch.setenv(_MARK, str(tmp_path))
    text = run([_run_script(checkout, language), where], _name(language), _SECONDS, tmp_path)
    assert _marked_processes(tmp_path) == [], "the example ended before its runner"
    assert text.rstrip() == expected.rstrip() != ""


@pytest.mark.parametrize("language", _EXTRACTING, ids=lambda each: each.name)
def test_the_example_builds_itself_and_prints_the_record(
    need: Callable[[Language], None],
    language: Language,
    servers: dict[str, Server],
    checkout: Path,
    tmp_path: Path,
) -> None:
    need(language.toolchain)
    address = servers["plain"].address
    with RunnerClient(address) as client:
        answer = client.complete_chat(
            [ChatMessage("user", MESSAGE)],
            options=Options(temperature=0, num_predict=400),
            constraint=JsonSchema(PERSON),
        )
    person = json.loads(answer.content)
    pets = " ".join(json.dumps(pet) for pet in person["pets"])
    expected = f"name {json.dumps(person['name'])}, age {person['age']}, pets [{pets}]\n"
    found = run([_run_script(checkout, language), address], _name(language), _SECONDS, tmp_path)
    assert found == expected


@pytest.mark.parametrize("language", _EXAMPLES, ids=lambda each: each.name)
def test_the_example_prints_the_reason_of_a_failure(
    need: Callable[[Language], None],
    language: Language,
    servers: dict[str, Server],
    checkout: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need(language.toolchain)
    where, reason = servers["token"].address, "UNAUTHENTICATED"
    if language.name in SPAWN:
        where, reason = str(tmp_path / "nothing"), "MODEL_NOT_FOUND"
    if language.name == "python":
        reason = "ModelNotFoundError"
    monkeypatch.setenv(_MARK, str(tmp_path))
    with pytest.raises(Failed, match=f"(?s)ended with 1:.*{reason}"):
        run([_run_script(checkout, language), where], _name(language), _SECONDS, tmp_path)
    assert psutil.wait_procs(_marked_processes(tmp_path), _GONE_SECONDS)[1] == []


def test_the_examples_are_short() -> None:
    lines = {
        path.relative_to(ROOT): len(path.read_text().splitlines())
        for path in _source_files("examples")
        if path.suffix in SOURCES
    }
    assert {path.parts[1] for path in lines} == SPAWN | CALL
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}


def _run_script(checkout: Path, language: Language) -> str:
    return str(checkout / "examples" / language.name / "run")


def _name(language: Language) -> str:
    return f"example in {language.name}"


def _marked_processes(folder: Path) -> list[psutil.Process]:
    """Return the processes left by the example of a test."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(_MARK) == str(folder):
                found.append(process)
    return found


def _source_files(*folders: str) -> list[Path]:
    """Return the files of folders, without build outputs."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in sorted(set(found.stdout.splitlines()))]
    return [file for file in files if file.exists()]
