"""``mlx-runner chat --json-schema`` with a real model, through pipes and in a terminal."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner_client import RunnerProcess
from runner_client.cli.demo import demo_model
from runner_client.cli.shared.dialogue import PROMPT, UNFINISHED
from runner_common.contract import TOKEN_VARIABLE
from support.terminal import in_terminal

if importlib.util.find_spec("mlx") is None:
    pytest.skip("mlx is not installed (the server extra)", allow_module_level=True)
pytestmark = pytest.mark.mlx

COMMAND = str(Path(sysconfig.get_path("scripts")) / "mlx-runner")
TEMPLATE = (
    "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant\n{% endif %}"
)
SCHEMA = {
    "type": "object",
    "properties": {
        "word": {"enum": ["left", "right"]},
        "sizes": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2},
    },
    "required": ["word", "sizes"],
    "additionalProperties": False,
}
ENDLESS = {"type": "string", "pattern": "^xx[a-z ]{5000}$"}
VARIED = ("--temperature", "2")
"""Options of an answer whose text repeats too little to be drafted."""


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunnerProcess]:
    """A runner of the demo model with a chat template."""
    model = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(demo_model(), model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    with RunnerProcess(str(model)) as process:
        yield process


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "schema.json"


def command(runner: RunnerProcess, file: Path, schema: object, *options: str) -> list[str]:
    """Return the command, with the schema in a file."""
    file.write_text(json.dumps(schema))
    address = runner.address or ""
    return [COMMAND, "chat", "--address", address, "--json-schema", str(file), *options]


def talk(arguments: list[str], runner: RunnerProcess, *lines: str) -> tuple[int, str, str]:
    """Run the command on lines of input; return exit code, stdout and stderr."""
    done = subprocess.run(
        arguments,
        input="".join(f"{line}\n" for line in lines),
        env={TOKEN_VARIABLE: runner.token or ""},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def values(text: str) -> list[object]:
    """Return the JSON values in a text, one after the other."""
    found: list[object] = []
    while text := text.lstrip():
        value, end = json.JSONDecoder().raw_decode(text)
        found.append(value)
        text = text[end:]
    return found


def test_every_answer_is_a_value_of_the_schema(runner: RunnerProcess, file: Path) -> None:
    arguments = command(runner, file, SCHEMA, "--seed", "1")
    code, out, err = talk(arguments, runner, "one", "two", "/reset", "three")
    assert (code, err) == (0, "")
    answers = values(out)
    assert len(answers) == 3
    for answer in answers:
        assert isinstance(answer, dict)
        assert answer["word"] in {"left", "right"}
        assert set(answer["sizes"]) <= {1, 2}


def test_an_answer_that_is_cut_is_told(runner: RunnerProcess, file: Path) -> None:
    arguments = command(runner, file, SCHEMA, "--num-predict", "2")
    code, out, err = talk(arguments, runner, "one", "two")
    assert (code, err) == (0, f"{UNFINISHED}\n" * 2)
    assert out.lstrip().startswith("{")


def test_a_schema_that_the_runner_refuses_ends_the_program(
    runner: RunnerProcess, file: Path
) -> None:
    schema = {"properties": {"tags": {"type": "array", "uniqueItems": True}}}
    code, out, err = talk(command(runner, file, schema), runner, "one", "two")
    assert (code, out) == (2, "")
    assert err.startswith("error: --json-schema: at #/properties/tags: ")


def test_an_interrupted_answer_leaves_a_conversation_that_goes_on(
    runner: RunnerProcess, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, runner.token or "")
    with in_terminal(command(runner, file, ENDLESS, *VARIED)) as terminal:
        terminal.read_until(PROMPT)
        for _ in range(2):
            terminal.send("go\n")
            terminal.read_until('"xx')
            terminal.interrupt()
            terminal.read_until(PROMPT)
        terminal.send("/bye\n")
        terminal.read_to_end()
        assert terminal.process.wait() == 0


def test_a_killed_runner_ends_the_program_with_its_error(
    runner: RunnerProcess, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunnerProcess(runner.model_path) as victim:
        monkeypatch.setenv(TOKEN_VARIABLE, victim.token or "")
        with in_terminal(command(victim, file, ENDLESS, *VARIED)) as terminal:
            terminal.read_until(PROMPT)
            terminal.send("go\n")
            terminal.read_until('"xx')
            victim.kill()
            assert "\r\nerror: " in terminal.read_to_end()
            assert terminal.process.wait() == 1
