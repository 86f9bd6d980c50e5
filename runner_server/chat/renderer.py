"""Rendering of conversations to prompts, in a process that templates cannot leave or block.

The same process parses the tool calls in answers.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Timer
from typing import IO, Any, cast

from runner_common.interpreter import interpreter
from runner_server.chat.format import ChatFormat
from runner_server.chat.frames import read_frame, write_frame
from runner_server.chat.limits import MAX_CPU_SECONDS, MAX_WALL_SECONDS
from runner_server.errors import GenerationFailed, InvalidField, ModelUnsupported, ShuttingDown

_COMMAND = ("-P", "-m", "runner_server.chat.worker")
_PRELOAD = "LD_PRELOAD"
"""Variable with the BLAS library, which the process does not need."""

_FIELD = "messages"


@dataclass(frozen=True)
class Conversation:
    """A conversation as chat templates read it: plain JSON data.

    Attributes:
        messages: The messages, at least one.
        tools: The tools; None if there are none, which templates tell apart from an empty list.
        arguments: Further arguments of the template.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


class ChatRenderer:
    """Renders conversations one after another, in a process started by the first one.

    A template that uses up its CPU time ends the process, and the next conversation starts another.
    So does a process that has become large.

    Args:
        cpu_seconds: CPU time of one rendering.
    """

    def __init__(self, cpu_seconds: float = MAX_CPU_SECONDS) -> None:
        self._cpu_seconds = cpu_seconds
        # A pool of its own: a template that loops must not keep texts from being tokenized.
        self._thread = ThreadPoolExecutor(1, "chat-template")
        self._worker: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    async def render(self, model: ChatFormat, conversation: Conversation) -> str:
        """Return the prompt of a conversation, which ends where the assistant's turn begins.

        Args:
            model: The chat format of the model.
            conversation: The conversation.

        Raises:
            InvalidField: The model has no template, or the template refuses the conversation, or
                takes too much time or memory.
            ModelUnsupported: The template cannot be read or is not valid.
            GenerationFailed: The process crashed.
            ShuttingDown: The renderer is closed.
        """
        answer = await self._ask(_request(model, conversation))
        if "text" in answer:
            return _sendable(answer["text"])
        if answer.get("is_invalid"):
            raise ModelUnsupported(f"the model's chat template is not valid: {answer['problem']}")
        raise InvalidField([(_FIELD, f"the model's chat template: {answer['problem']}")])

    async def parse_calls(
        self, parser: str, tools: Sequence[Mapping[str, Any]], text: str
    ) -> Sequence[Mapping[str, Any]]:
        """Return the tool calls in a text; none if it cannot be parsed.

        Args:
            parser: File of mlx_lm's parser.
            tools: The tools of the conversation, whose schemas some formats need.
            text: The text between the markers of calls.

        Raises:
            GenerationFailed: The process crashed.
            ShuttingDown: The renderer is closed.
        """
        answer = await self._ask({"tool_parser": parser, "tools": tools, "text": text})
        calls: Sequence[Mapping[str, Any]] = answer.get("calls", ())
        return calls

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._is_closed:
            raise _stopping()
        loop = asyncio.get_running_loop()
        limited = request | {"cpu_seconds": self._cpu_seconds}
        return await loop.run_in_executor(self._thread, self._exchange, limited)

    def close(self) -> None:
        """End the process; conversations being rendered fail. No-op if closed already."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._worker:
            self._worker.kill()
        self._thread.submit(self._reap)
        self._thread.shutdown(wait=True)

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request to the process, which is started if there is none; return the answer."""
        if self._is_closed:
            raise _stopping()
        worker = self._worker = self._worker or _start()
        watchdog = Timer(MAX_WALL_SECONDS, worker.kill)
        watchdog.start()
        try:
            write_frame(cast("IO[bytes]", worker.stdin), request)
            answer = read_frame(cast("IO[bytes]", worker.stdout))
        except OSError:
            answer = None
        finally:
            watchdog.cancel()
        if answer is None:
            return self._reap()
        if answer["is_large"]:
            self._end()
        return answer

    def _end(self) -> subprocess.Popen[bytes] | None:
        """End the process, if there is one, and return it."""
        worker, self._worker = self._worker, None
        if worker:
            # A broken pipe: the process has ended before it has read all of the request.
            with suppress(BrokenPipeError), worker:
                worker.kill()
        return worker

    def _reap(self) -> dict[str, Any]:
        """End the process; return the answer of one that its template has ended."""
        worker = self._end()
        if worker is None:
            return {}
        if worker.returncode == -signal.SIGPROF:
            return {"problem": f"it takes more than {self._cpu_seconds:g} s of CPU time"}
        if self._is_closed:
            raise _stopping()
        raise GenerationFailed(
            f"the process that renders chat templates ended with exit code {worker.returncode}; "
            "retry, which starts another"
        )


def _request(model: ChatFormat, conversation: Conversation) -> dict[str, Any]:
    if model.problem:
        raise ModelUnsupported(model.problem)
    return {
        "python_template": model.python_template,
        "template": "" if model.python_template else _choose(model, conversation),
        "messages": conversation.messages,
        "tools": conversation.tools,
        "special_tokens": model.special_tokens,
        "arguments": {**model.special_tokens, **conversation.arguments},
    }


def _choose(model: ChatFormat, conversation: Conversation) -> str:
    """Return the template for a conversation, chosen like in transformers."""
    templates = model.templates
    if conversation.tools is not None and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    if templates:
        problem = f"the model has only the chat templates {', '.join(sorted(templates))}"
        raise InvalidField([(_FIELD, f"{problem}; name one of them `default` in its files")])
    problem = (
        "the model has no chat template; use Completion, or add a chat_template.jinja to the "
        "model's directory and load it again"
    )
    raise InvalidField([(_FIELD, problem)])


def _sendable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        problem = "the model's chat template writes a lone surrogate, which is not text"
        raise InvalidField([(_FIELD, problem)]) from None
    return text


def _stopping() -> ShuttingDown:
    return ShuttingDown("the process is stopping; use another runner")


def _start() -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != _PRELOAD}
    try:
        return subprocess.Popen(
            [interpreter(), *_COMMAND],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    except OSError as error:
        raise GenerationFailed(
            f"the process that renders chat templates cannot be started: {error}"
        ) from error
