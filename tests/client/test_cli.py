"""Behaviour common to every command: help, exit codes and error output."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from runner_client.cli import load, main, run, status
from runner_client.cli.shared.errors import EXIT_CODES
from runner_client.cli.shared.flags import message_with_flags
from runner_client.cli.shared.options import size, size_or_zero
from runner_client.errors import (
    InsufficientMemoryError,
    InvalidRequestError,
    LoadRequiresFullError,
    PromptTooLongError,
    RunnerError,
    RunnerUnavailableError,
)
from support.command_line import invoke

COMMANDS = (
    *("demo", "doctor", "estimate", "run", "serve"),
    *("load", "unload", "status", "tokenize", "trim"),
)


def test_help_lists_every_command_with_a_description() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    described = {words[0] for words in lines if len(words) > 2}
    assert described >= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_lists_the_exit_codes(name: str) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0
    words = " ".join(result.output.split())
    assert "0 success" in words
    assert "130 interrupted" in words


def test_serve_and_doctor_alone_have_other_exit_codes() -> None:
    for name in ("", *COMMANDS):
        words = " ".join(invoke(*name.split(), "--help").output.split())
        assert (" ".join(EXIT_CODES.split()) in words) is (name not in {"serve", "doctor"}), name


def test_the_command_line_does_not_import_the_server() -> None:
    script = (
        "import sys; from runner_client.cli import demo, main; demo.demo_model(); "
        "assert not {'mlx', 'mlx_lm', 'runner_server'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=_with_paths())


def _with_paths() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_version_names_the_program() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert "mlx-runner" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["status"],
        ["status", ""],
        ["status", "localhost"],
        ["trim", "http://a:1"],
        ["estimate", "model", "--address", "a"],
        ["tokenize", "a:1", "--model", "m", "text"],
        ["tokenize", "a", "text"],
        ["tokenize", "a:1", "more", "words"],
        ["run", "model"],
        ["run", "model", "hi", "--temperature", "-1"],
        ["run", "model", "hi", "--top-p", "0"],
        ["run", "model", "hi", "--num-predict", "0"],
        ["run", "model", "hi", "--seed", "x"],
        ["run", "model", "hi", "--seed", str(2**63)],
        ["run", "model", ""],
        ["run", "model", "hi", "--dtype", "int8"],
        ["run", "model", "caf\udce9"],
        ["run", "model", "more", "words"],
        ["run", "hi"],
        ["run", "model", "hi", "--address", "a:1"],
        ["run", "model", "hi", "--token-file", __file__],
        ["run", "hi", "--address", "a:1", "--context-length", "99"],
        ["run", "", "--address", "a:1"],
        ["load", "a:1"],
        ["load", "a:1", ""],
        ["load", "a", "model"],
        ["load", "a:1", "model", "--memory-limit", "0"],
        ["unload", "a"],
        ["tokenize", "text"],
        ["tokenize", "text", "--address", "a:1", "--model", "m"],
        ["tokenize", "one", "--detokenize", "--address", "a:1"],
        ["tokenize", "2147483648", "--detokenize", "--address", "a:1"],
        ["tokenize", "1", "--detokenize", "--add-special-tokens", "--address", "a:1"],
        ["estimate", "model", "--parallel", "0"],
        ["estimate", "model", "--address", ""],
        ["estimate", "model", "--address", "a:1", "--backend", "cpu"],
        ["estimate", "model", "--token-file", __file__],
        ["trim"],
        ["trim", ""],
        ["trim", "a:1", "--prefix-cache", "-1"],
        ["serve", "--memory-limit", "8 apples", "--model", "m"],
        ["serve", "--context-length", "100"],
        ["serve", "--prefix-cache", "0"],
        ["serve", "--prefix-cache", "-1", "--model", "m"],
        ["serve", "--pipeline"],
        ["serve", "--tls-cert", __file__],
        ["serve", "--token-file", "/no/such/file"],
        ["serve", "--model-root", __file__],
        ["serve", "--stall-seconds", "soon"],
        ["serve", "--max-queued", "many"],
        ["serve", "--metrics-listen", "9464"],
        ["serve", "--log-level", "LOUD"],
        ["run", "model", "hi", "--prefix-cache", "much"],
    ],
)
def test_usage_errors_are_reported_before_anything_starts(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Usage: ")
    assert "Error: " in result.stderr


def _failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Any:
    def fail() -> None:
        raise error

    monkeypatch.setitem(main.commands, "fail", click.Command("fail", callback=fail))
    return invoke("fail")


def test_a_library_error_is_one_line_on_standard_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = _failing(monkeypatch, RunnerError("needs 9 GiB, 4 GiB are free; ask for less"))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "error: needs 9 GiB, 4 GiB are free; ask for less\n"


def _violation(field: str, text: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {text}", field_violations=[(field, text)])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InsufficientMemoryError("the model needs 9.0 GiB"), 3),
        (LoadRequiresFullError("the model needs 9.0 GiB"), 3),
        (_violation("prompt", "the prompt has no tokens"), 2),
        (PromptTooLongError("the prompt has 9 tokens"), 1),
        (RunnerUnavailableError("cannot reach the runner"), 1),
    ],
)
def test_each_kind_of_error_has_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: RunnerError, code: int
) -> None:
    result = _failing(monkeypatch, error)
    assert (result.exit_code, result.stderr) == (code, f"error: {error}\n")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (_violation("context_length", "99 is too much"), "--context-length: 99 is too much"),
        (_violation("options.top_k", "-2; at least 0"), "--top-k: -2; at least 0"),
        (_violation("prompt_token_ids.ids[3]", "7"), "prompt_token_ids.ids[3]: 7"),
        (
            RunnerError("lower prefix_cache_bytes or context_length, for a dtype"),
            "lower --prefix-cache or --context-length, for a dtype",
        ),
        (RunnerError("no model at /context_length/a.context_length"), None),
        (
            InsufficientMemoryError("load with a smaller context_length, parallel, dtype or x"),
            "load with a smaller --context-length, --dtype or x",
        ),
        (
            InsufficientMemoryError('or override the gate with memory_override. dtype "as_stored"'),
            "or override the gate with --memory-override. --dtype as_stored",
        ),
        (RunnerError("load it with dtype float32, or"), "load it with --dtype float32, or"),
        (
            RunnerError("look at its log, or raise Timeouts.start_seconds"),
            "look at its log",
        ),
        (
            RunnerError("(42 %); wait until Status says STATE_ACTIVE"),
            "(42 %); wait until `mlx-runner status ADDRESS` says active",
        ),
    ],
)
def test_errors_name_options_rather_than_fields(error: RunnerError, says: str | None) -> None:
    assert message_with_flags(error, run.command) == (says or str(error))


def test_an_error_of_memory_names_every_option_of_a_load() -> None:
    error = InsufficientMemoryError("lower context_length (4096) or parallel (2)")
    text = "lower --context-length (4096) or --parallel (2)"
    assert message_with_flags(error, load.command) == text


def test_errors_name_only_options_of_the_command() -> None:
    error = _violation("context_length", "99 is too much")
    assert message_with_flags(error, None) == message_with_flags(error, status.command)
    assert message_with_flags(error, None) == "context_length: 99 is too much"


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _failing(monkeypatch, KeyboardInterrupt())
    assert result.exit_code == 130
    assert result.stderr == "\ninterrupted\n"


def test_a_broken_pipe_exits_without_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _failing(monkeypatch, BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert result.exit_code == 1
    assert result.output == ""


def test_a_full_disk_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _failing(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    assert result.exit_code == 1
    assert result.stderr == "error: [Errno 28] No space left on device\n"


def test_unexpected_exceptions_propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _failing(monkeypatch, ZeroDivisionError())
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize(("given", "reason"), [("0", "above 0"), ("-1", "not a size")])
def test_a_limit_is_a_size_above_zero(given: str, reason: str) -> None:
    assert size("8GiB") == 8 * 2**30
    with pytest.raises(click.BadParameter, match=reason):
        size(given)


def test_a_size_may_be_zero_where_that_means_off() -> None:
    assert size_or_zero("0") == 0
    assert size_or_zero("8GiB") == 8 * 2**30
    with pytest.raises(click.BadParameter, match="is not a size"):
        size_or_zero("-1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("load a:1 m --parallel abc", "'--parallel': 'abc' is not a whole number (1 to 256)"),
        ("load a:1 m --parallel 300", "'--parallel': 300 is not in the range 1 to 256"),
        ("serve --parallel abc", "'--parallel': 'abc' is not a whole number (1 to 256)"),
        ("run m x --top-k -1", "-1 is not in the range 0 to the size of the vocabulary"),
        ("run m x --temperature hot", "'--temperature': 'hot' is not a number (0 to 100)"),
        ("run m x --temperature nan", "nan is not in the range 0 to 100"),
        ("run m x --top-p 0", "0 is not in the range above 0 to 1"),
        ("run m x --repeat-penalty 0.001", "0.001 is not in the range 0.01 to 100"),
        ("load a:1 m --context-length 1", "1 is not in the range 2 to the model's own limit"),
    ],
)
def test_a_wrong_number_names_the_range_of_the_protocol(arguments: str, message: str) -> None:
    result = invoke(*arguments.split())
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("model", ["org/name", "/models/name", "./name", "here"])
@pytest.mark.parametrize("command", ["load", "tokenize"])
def test_a_model_in_place_of_the_address_is_noticed(
    command: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    result = invoke(command, model, "localhost:1")
    assert result.exit_code == 2
    assert f"{model!r} is a path or the hub id of a model; the address" in result.stderr
    assert "comes first" in result.stderr


def test_placeholders_of_a_usage_text_are_told_apart() -> None:
    assert "--model MODEL" in invoke("tokenize", "--help").output
