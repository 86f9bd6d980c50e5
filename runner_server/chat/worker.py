"""``python -m runner_server.chat.worker``: renders chat templates, and parses tool calls.

Templates come with models, so they are code from elsewhere, and parsers of tool calls are regular
expressions over what a model wrote. A thread that loops cannot be ended, and one operation such as
``10 ** (10 ** 10)`` keeps all threads of a process waiting. This process can: the kernel ends it
when a request has used up its CPU time.

Reads requests from standard input until its end, which comes at the latest when the server ends,
and writes an answer to each to standard output; see :mod:`runner_server.chat.frames`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from runner_common.signals import reset_inherited_signals
from runner_server.chat.environment import compiled, render, with_reasoning
from runner_server.chat.frames import read_frame, write_frame
from runner_server.chat.limits import MAX_KEPT_BYTES, MAX_MEMORY_BYTES, MAX_PROMPT_CHARS

_STATM = Path("/proc/self/statm")
_MAX_WORDS = 500
"""Most characters of an error's text in an answer."""


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``text`` or ``calls``; otherwise ``problem``, and if the template ``is_invalid``."""
    try:
        if parser := request.get("tool_parser"):
            return {"calls": _parse(parser, request)}
        text = _render(request)
    except TemplateSyntaxError as error:
        return {"problem": f"line {error.lineno}: {error.message}"[:_MAX_WORDS], "is_invalid": True}
    except MemoryError:
        return {"problem": f"it takes more than {MAX_MEMORY_BYTES >> 20} MiB of memory"}
    except TemplateError as error:
        return {"problem": str(error)[:_MAX_WORDS]}
    except Exception as error:  # noqa: BLE001 - a template can raise anything
        return {"problem": f"{type(error).__name__}: {error}"[:_MAX_WORDS]}
    if len(text) > MAX_PROMPT_CHARS:
        return {"problem": f"it writes more than {MAX_PROMPT_CHARS} characters"}
    return {"text": text}


def _render(request: Mapping[str, Any]) -> str:
    if file := request["python_template"]:
        return _render_python(_function(file), request)
    with _limits(request["cpu_seconds"]):
        template = compiled(request["template"])
        return render(template, request["messages"], request["tools"], request["arguments"])


def _render_python(function: Callable[..., str], request: Mapping[str, Any]) -> str:
    """Render with a template of mlx_lm, which expects the arguments of calls as JSON text."""
    messages = [dict(with_reasoning(message)) for message in request["messages"]]
    for message in messages:
        for call in message.get("tool_calls", ()):
            called = call["function"]
            called["arguments"] = json.dumps(called["arguments"], ensure_ascii=False)
    special = request["special_tokens"]
    arguments = {key: value for key, value in request["arguments"].items() if key not in special}
    if request["tools"]:
        arguments["tools"] = request["tools"]
    with _limits(request["cpu_seconds"]):
        return function(messages, add_generation_prompt=True, **arguments)


def _parse(file: str, request: Mapping[str, Any]) -> list[Any]:
    """Return the tool calls in a text, as mlx_lm's parser gives them.

    Raises:
        ValueError: The calls have no form in JSON.
    """
    parse = _parser(file)
    with _limits(request["cpu_seconds"]):
        found = parse(request["text"], request["tools"])
        calls = found if isinstance(found, list) else [found]
        json.dumps(calls, allow_nan=False)
    return calls


@lru_cache
def _parser(file: str) -> Callable[[str, Any], Any]:
    """Import a parser of mlx_lm, which may import others beside it, without mlx_lm itself."""
    path = Path(file)
    package = ModuleType("tool_parsers")
    package.__path__ = [str(path.parent)]
    sys.modules[package.__name__] = package
    module = importlib.import_module(f"{package.__name__}.{path.stem}")
    parse: Callable[[str, Any], Any] = module.parse_tool_call
    return parse


@lru_cache
def _function(file: str) -> Callable[..., str]:
    spec = importlib.util.spec_from_file_location("python_template", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., str] = module.apply_chat_template
    return function


@contextmanager
def _limits(cpu_seconds: float) -> Iterator[None]:
    """Bound CPU time, whose end ends the process, and memory, whose end raises MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    # macOS has neither the file nor an effect of the limit.
    if _STATM.exists():
        resource.setrlimit(resource.RLIMIT_AS, (_memory_bytes(0) + MAX_MEMORY_BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _memory_bytes(field: int) -> int:
    """Return the size of this process: of its address space (0), or the resident part (1)."""
    return int(_STATM.read_text().split()[field]) * resource.getpagesize()


def _is_large() -> bool:
    return _STATM.exists() and _memory_bytes(1) > MAX_KEPT_BYTES


def main() -> int:
    """Answer requests; return the exit code."""
    reset_inherited_signals()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # The server decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while (request := read_frame(sys.stdin.buffer)) is not None:
        found = answer(request)
        write_frame(sys.stdout.buffer, found | {"is_large": _is_large()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
