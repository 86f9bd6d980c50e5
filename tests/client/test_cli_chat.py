"""``mlx-runner chat`` on a fake runner."""

from __future__ import annotations

import os
import signal
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client.cli import chat
from runner_client.cli.shared.dialogue import INTERRUPTED, NOT_LITERAL, PROMPT, QUOTES
from runner_client.testing import Failure, FakeRunner, fake_runner
from support.command_line import invoke
from support.terminal import END, in_terminal

if TYPE_CHECKING:
    from click.testing import Result

COMMAND = str(Path(sysconfig.get_path("scripts")) / "mlx-runner")

USER, ASSISTANT = pb.ROLE_USER, pb.ROLE_ASSISTANT


@pytest.fixture
def fake() -> Iterator[FakeRunner]:
    """A fake runner with the same answer to every message."""
    with fake_runner(pieces=("Hello", " wörld")) as runner:
        yield runner


def talk(fake: FakeRunner, *lines: str, options: tuple[str, ...] = ()) -> Result:
    """Run the command on lines of input."""
    given = "".join(f"{line}\n" for line in lines)
    return invoke("chat", "--address", fake.address, *options, given=given)


def said(fake: FakeRunner) -> list[list[tuple[int, str]]]:
    """Return role and text of the messages in each request."""
    requests = [request for request in fake.requests if isinstance(request, pb.ChatRequest)]
    return [[(m.role, m.content) for m in request.messages] for request in requests]


def test_every_line_is_answered_with_the_conversation_so_far(fake: FakeRunner) -> None:
    result = talk(fake, "Hi", "", "And?", options=("--system", "Be brief."))
    assert result.exit_code == 0, result.output
    assert result.stdout == "Hello wörld\nHello wörld\n"
    system = (pb.ROLE_SYSTEM, "Be brief.")
    first = [system, (USER, "Hi")]
    assert said(fake) == [first, [*first, (ASSISTANT, "Hello wörld"), (USER, "And?")]]


def test_options_reach_the_runner(fake: FakeRunner) -> None:
    talk(fake, "Hi", options=("--temperature", "0", "--stop", "x", "--num-predict", "9"))
    (request,) = (r for r in fake.requests if isinstance(r, pb.ChatRequest))
    assert request.options == pb.CompletionOptions(temperature=0, stop=["x"], num_predict=9)


def test_special_tokens_in_messages_are_text_if_the_model_can_do_it(fake: FakeRunner) -> None:
    def literal() -> list[bool]:
        return [each.literal for each in fake.requests if isinstance(each, pb.ChatRequest)]

    assert talk(fake, "a", "b").stderr == ""
    assert literal() == [True, True]
    fake.requests.clear()
    violation = ("literal", "no other tokens for '<s>'")
    fake.failure = Failure("INVALID_FIELD", ": ".join(violation), field_violations=[violation])
    result = talk(fake, "<s>", "b")
    # The fake refuses every request, so the second one is shown as a failure.
    told = f"literal: {violation[1]}"
    assert result.stderr == f"{told}; {NOT_LITERAL}\n" + f"error: {told}\n" * 2
    assert literal() == [True, False, False]


def test_reset_begins_anew(fake: FakeRunner) -> None:
    talk(fake, "a", "/reset", "b", options=("--system", "s"))
    assert said(fake)[1] == [(pb.ROLE_SYSTEM, "s"), (USER, "b")]


def test_bye_ends_before_the_end_of_the_input(fake: FakeRunner) -> None:
    assert talk(fake, "a", "/bye", "b").exit_code == 0
    assert len(said(fake)) == 1


def test_help_and_unknown_commands_are_not_sent(fake: FakeRunner) -> None:
    result = talk(fake, "/help", "/what", "/etc/hosts: what is this?")
    assert "/reset" in result.stderr
    assert "no command /what" in result.stderr
    assert said(fake) == [[(USER, "/etc/hosts: what is this?")]]


def test_quotes_hold_several_lines(fake: FakeRunner) -> None:
    talk(fake, '"""a', "", '  b"""', '"""one"""')
    assert [messages[-1][1] for messages in said(fake)] == ["a\n\n  b", "one"]


def test_reasoning_goes_to_stderr_and_into_the_conversation(fake: FakeRunner) -> None:
    fake.reasoning = ("Hm", "m")
    result = talk(fake, "a", "b")
    assert result.stdout == "Hello wörld\nHello wörld\n"
    assert "Hmm" in result.stderr
    request = fake.requests[-1]
    assert isinstance(request, pb.ChatRequest)
    assert request.messages[1].reasoning == "Hmm"


def test_a_refused_message_is_left_out(fake: FakeRunner) -> None:
    fake.failure = Failure("INVALID_FIELD", "Roles must alternate")
    result = talk(fake, "a", "b")
    assert result.exit_code == 0
    assert result.stderr.count("error: ") == 2
    assert [len(messages) for messages in said(fake)] == [1, 1]


def test_a_long_conversation_says_what_to_do(fake: FakeRunner) -> None:
    fake.failure = Failure("PROMPT_TOO_LONG", "load with a larger context_length")
    stderr = talk(fake, "a").stderr
    assert stderr == "error: load with a larger --context-length; /reset begins anew\n"


def test_every_answer_obeys_the_schema(fake: FakeRunner, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"const": "é"}', encoding="utf-8")
    result = talk(fake, "a", "/reset", "b", options=("--json-schema", str(file)))
    assert (result.exit_code, result.stderr) == (0, "")
    requests = [request for request in fake.requests if isinstance(request, pb.ChatRequest)]
    assert [request.constraint.json_schema for request in requests] == ['{"const": "é"}'] * 2


def test_without_a_schema_no_constraint_is_sent(fake: FakeRunner) -> None:
    talk(fake, "a")
    (request,) = (r for r in fake.requests if isinstance(r, pb.ChatRequest))
    assert not request.HasField("constraint")


@pytest.mark.parametrize(
    ("field", "named"),
    [("constraint.json_schema", "--json-schema"), ("options.top_k", "--top-k")],
)
def test_a_refused_option_ends_the_program(fake: FakeRunner, field: str, named: str) -> None:
    violation = (field, "out of range")
    fake.failure = Failure("INVALID_FIELD", ": ".join(violation), field_violations=[violation])
    result = talk(fake, "a", "b")
    assert (result.exit_code, result.stderr) == (2, f"error: {named}: out of range\n")
    assert len(said(fake)) == 1


@pytest.mark.parametrize("content", [None, b"\xff", b"{"], ids=["missing", "bytes", "cut"])
def test_a_file_that_is_not_json_is_refused_before_a_model_is_loaded(
    tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "schema.json"
    if content is not None:
        file.write_bytes(content)
    result = invoke("chat", "a/model", "--json-schema", str(file), given="Hi\n")
    assert result.exit_code == 2
    assert f"'--json-schema': {file} " in result.stderr


def test_another_failure_ends_the_program(fake: FakeRunner) -> None:
    fake.failure = Failure("GENERATION_FAILED", "no more")
    result = talk(fake, "a", "b")
    assert result.exit_code == 1
    assert "no more" in result.stderr
    assert len(said(fake)) == 1


def test_a_model_without_a_template_is_refused_at_once(fake: FakeRunner) -> None:
    fake.has_chat_template = False
    result = talk(fake, "a")
    assert result.exit_code == 1
    assert "chat_template.jinja" in result.stderr
    assert not said(fake)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("m", "--address", "h:1"),
        ("--address", "h:1", "--dtype", "float32"),
        ("m", "--tls-ca", "x"),
    ],
)
def test_wrong_usage_is_refused(arguments: tuple[str, ...]) -> None:
    assert invoke("chat", *arguments).exit_code == 2


def test_a_model_is_run_for_the_conversation(
    fake: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from client.test_cli_run import FakeProcess

    started: list[FakeProcess] = []

    def start(model: str, **settings: Any) -> FakeProcess:
        started.append(FakeProcess(fake, model, **settings))
        return started[-1]

    monkeypatch.setattr(chat, "RunnerProcess", start)
    result = invoke("chat", "a/model", given="Hi\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == "Hello wörld\n"
    assert started[0].has_exited


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupt_ends_the_answer_and_not_the_program(fake: FakeRunner) -> None:
    fake.stall_after = 1
    with subprocess.Popen(
        [COMMAND, "chat", "--address", fake.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("one\n")
        process.stdin.flush()
        assert process.stdout.read(5) == "Hello"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "\n"
        fake.stall_after = None
        out, err = process.communicate("two\n", timeout=60)
    assert (process.returncode, out) == (0, "Hello wörld\n"), err
    assert fake.cancelled.is_set()
    # The part shown of an answer belongs to the conversation.
    assert said(fake)[1] == [(USER, "one"), (ASSISTANT, "Hello"), (USER, "two")]


def test_an_interrupt_drops_what_is_typed_and_a_second_one_ends_the_program(
    fake: FakeRunner,
) -> None:
    with in_terminal([COMMAND, "chat", "--address", fake.address]) as terminal:
        terminal.read_until(PROMPT)
        for typed in ("half a line", f"{QUOTES}one\ntwo\nthr"):
            terminal.send(typed)
            terminal.read_until(typed[-3:])
            terminal.interrupt()
            assert INTERRUPTED in terminal.read_until(PROMPT)
            terminal.send("whole\n")
            assert "Hello wörld" in terminal.read_until(PROMPT)
        terminal.interrupt()
        terminal.read_until(PROMPT)
        terminal.interrupt()
        assert "interrupted" in terminal.read_to_end()
        assert terminal.process.wait() == 130
    answer = (ASSISTANT, "Hello wörld")
    assert said(fake) == [[(USER, "whole")], [(USER, "whole"), answer, (USER, "whole")]]


def test_the_end_of_the_input_ends_the_program_in_a_terminal(fake: FakeRunner) -> None:
    with in_terminal([COMMAND, "chat", "--address", fake.address]) as terminal:
        terminal.read_until(PROMPT)
        terminal.send(END)
        terminal.read_to_end()
        assert terminal.process.wait() == 0
