"""A conversation in the terminal: the user's messages, and the answers as they are generated."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from runner_client.cli.shared.errors import Failure
from runner_client.cli.shared.flags import message_with_flags
from runner_client.errors import InvalidRequestError, PromptTooLongError, RunnerError
from runner_client.types import ChatMessage
from runner_common.signals import Interrupted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runner_client.process.process import RunnerProcess
    from runner_client.rpc.client import RunnerClient
    from runner_client.rpc.stream import ChatStream
    from runner_client.types import JsonSchema, Options

PROMPT, MORE = ">>> ", "... "
QUOTES = '"""'

_OF_ALL_REQUESTS = ("options.", "constraint", "adapter")
"""Beginnings of the fields that are the same in the request of every message."""

HELP = f"""\
/reset    begin a new conversation
/help     show this text
/bye      end (so does the end of input, Ctrl-D)
{QUOTES}       begins and ends a message of several lines
Ctrl-C    ends an answer, or drops the message being typed; twice, ends the program"""
NOT_LITERAL = "from now on, special tokens in messages count as such"
UNFINISHED = "the answer was cut short and does not obey the schema"
INTERRUPTED = "interrupted; Ctrl-C again, /bye or Ctrl-D ends"


class Dialogue:
    """A conversation with a runner, in which special tokens that the user types are text.

    Args:
        client: The runner.
        options: Options of every answer.
        system: Instructions for the model; empty for none.
        schema: What every answer must be; None for any text.
        adapter: The adapter that answers; empty for the model without one.
    """

    def __init__(
        self,
        client: RunnerClient | RunnerProcess,
        options: Options,
        system: str = "",
        schema: JsonSchema | None = None,
        adapter: str = "",
    ) -> None:
        self._client = client
        self._options = options
        self._schema = schema
        self._adapter = adapter
        self._is_literal = True
        self._begin = [ChatMessage("system", system)] if system else []
        self.messages = list(self._begin)

    def run(self) -> None:
        """Answer messages from standard input until its end.

        Raises:
            Failure: The model has no chat template.
            RunnerError: The runner cannot go on.
        """
        model = self._client.status().model
        if model is not None and model.capabilities.chat is False:
            raise Failure(
                f"{model.name} has no chat template: use run, or add a chat_template.jinja to its "
                "directory"
            )
        interrupted = False
        with contextlib.suppress(EOFError):
            while True:
                try:
                    text = _read_message().strip()
                    if text == "/bye":
                        return
                    self._obey(text)
                    interrupted = False
                except (KeyboardInterrupt, Interrupted):
                    # It may have been meant for an answer that has just ended.
                    if interrupted or not sys.stdin.isatty():
                        raise
                    interrupted = True
                    click.echo(f"\n{INTERRUPTED}", err=True)

    def _obey(self, text: str) -> None:
        if text == "/reset":
            self.messages = list(self._begin)
        elif text == "/help":
            click.echo(HELP, err=True)
        elif text.startswith("/") and text[1:].isalpha():
            click.echo(f"there is no command {text}; /help lists them", err=True)
        elif text:
            self.answer(text)

    def answer(self, text: str) -> None:
        """Show the answer to a message, and add both to the conversation.

        A message that is refused, or whose answer was ended before its first word, is left out.

        Raises:
            InvalidRequestError: An option or the schema is refused, so every message would be.
            RunnerError: The runner cannot go on.
        """
        asked = [*self.messages, ChatMessage("user", text)]
        stream = self._client.chat(
            asked,
            options=self._options,
            constraint=self._schema,
            literal=self._is_literal,
            adapter=self._adapter,
        )
        shown: list[str] = []
        reasoning: list[str] = []
        try:
            is_whole = _show(stream, shown, reasoning)
        except InvalidRequestError as error:
            if any(field.startswith(_OF_ALL_REQUESTS) for field, _ in error.field_violations):
                raise
            if self._is_literal and any(field == "literal" for field, _ in error.field_violations):
                self._is_literal = False
                click.echo(f"{error}; {NOT_LITERAL}", err=True)
                self.answer(text)
                return
            advice = "; /reset begins anew" if isinstance(error, PromptTooLongError) else ""
            command = click.get_current_context().command
            Failure(f"{message_with_flags(error, command)}{advice}").show()
            return
        finally:
            if shown or reasoning:
                click.echo()
        if not is_whole:
            click.echo(UNFINISHED, err=True)
        if shown:
            reply = ChatMessage("assistant", "".join(shown), "".join(reasoning))
            self.messages = [*asked, reply]


def _show(stream: ChatStream, shown: list[str], reasoning: list[str]) -> bool:
    """Print an answer as it arrives, the reasoning to standard error; collect both.

    Returns:
        False if the answer was cut before it obeyed the schema.

    Raises:
        RunnerError: The answer failed, and was not ended by Ctrl-C.
    """
    is_whole = True
    with stream, _cancelled_by_interrupt(stream) as interrupted:
        try:
            for chunk in stream:
                if chunk.reasoning:
                    click.echo(click.style(chunk.reasoning, dim=True), nl=False, err=True)
                    reasoning.append(chunk.reasoning)
                if chunk.content:
                    if reasoning and not shown:
                        click.echo(err=True)
                    click.echo(chunk.content, nl=False)
                    shown.append(chunk.content)
                is_whole = chunk.constraint_satisfied is not False
        except RunnerError:
            if not interrupted.is_set():
                raise
    return is_whole


@contextmanager
def _cancelled_by_interrupt(stream: ChatStream) -> Iterator[threading.Event]:
    """Cancel a stream on SIGINT, instead of ending the program; yield whether that happened."""
    interrupted = threading.Event()

    def interrupt(_number: int, _frame: object) -> None:
        interrupted.set()
        # gRPC may be in the middle of a call in this thread.
        threading.Thread(target=stream.cancel).start()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _read_message() -> str:
    """Return the next message of the user, of several lines if it begins with quotes.

    Raises:
        EOFError: The input has ended.
    """
    first = _read_line(PROMPT)
    if not first.lstrip().startswith(QUOTES):
        return first
    lines = [first.lstrip().removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(_read_line(MORE))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines)


def _read_line(prompt: str) -> str:
    """Return a line of standard input, with a prompt and line editing on a terminal.

    Raises:
        EOFError: The input has ended.
    """
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            # Adds history and editing to input().
            import readline  # noqa: F401, PLC0415 - missing on some systems
        line = input(prompt)
    elif not (line := sys.stdin.readline()):
        raise EOFError
    # Bytes that are not text arrive as lone surrogates.
    return line.removesuffix("\n").encode(errors="replace").decode()
