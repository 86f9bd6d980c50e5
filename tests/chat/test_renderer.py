"""Rendering in another process: texts, refusals, and hostile templates."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

pytest.importorskip("jinja2", reason="jinja2 is not installed (the server extra)")

from runner_server.chat.format import ChatFormat
from runner_server.chat.renderer import ChatRenderer, Conversation
from runner_server.errors import GenerationFailed, InvalidField, ModelUnsupported, ShuttingDown
from support.conversations import WEATHER, call, user
from support.fakes import chat_format
from support.harness import eventually

HELLO = Conversation([user("hé 😀")])
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set n = namespace(x='a' * 2 ** 20) %}"
    "{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)


@pytest.fixture
async def renderer() -> AsyncIterator[ChatRenderer]:
    """A renderer with a limit of half a second of CPU time."""
    renderer = ChatRenderer(cpu_seconds=0.5)
    yield renderer
    renderer.close()


async def problem(renderer: ChatRenderer, template: str, **fields: Any) -> str:
    """Return the problem of a refused template."""
    with pytest.raises(InvalidField) as refused:
        await renderer.render(chat_format(template, **fields), HELLO)
    ((field, text),) = refused.value.violations
    assert field == "messages"
    return text


async def test_a_template_gets_messages_tools_special_tokens_and_arguments(
    renderer: ChatRenderer,
) -> None:
    template = (
        "{{ bos_token }}{{ messages[0].content }}{{ tools[0].function.name }}{{ eos_token }}"
        "{{ add_generation_prompt }}{{ documents }}{{ x }}"
    )
    format_ = chat_format(template, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
    arguments = {"x": [1, None], "eos_token": "!"}
    conversation = Conversation([user("hé 😀")], [WEATHER], arguments)
    text = await renderer.render(format_, conversation)
    assert text == "<s>hé 😀get_weather!TrueNone[1, None]"


async def test_without_tools_a_template_gets_none(renderer: ChatRenderer) -> None:
    assert await renderer.render(chat_format("{{ tools is none }}"), HELLO) == "True"


async def test_tools_choose_the_template_for_tools(renderer: ChatRenderer) -> None:
    format_ = ChatFormat(templates={"default": "plain", "tool_use": "tools", "rag": "rag"})
    assert await renderer.render(format_, HELLO) == "plain"
    assert await renderer.render(format_, Conversation([user()], [WEATHER])) == "tools"


async def test_a_template_refuses_with_its_own_words(renderer: ChatRenderer) -> None:
    text = await problem(renderer, "{{ raise_exception('Only two <roles> are supported') }}")
    assert text == "the model's chat template: Only two <roles> are supported"


async def test_an_error_in_a_template_is_a_refusal(renderer: ChatRenderer) -> None:
    assert "'x' is undefined" in await problem(renderer, "{{ x.y }}")
    assert "RecursionError" in await problem(
        renderer, "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
    )
    assert "surrogate" in await problem(renderer, "{{ '\\ud800' }}")
    assert "unsafe" in await problem(renderer, "{{ messages.append.__globals__ }}")


async def test_a_model_without_a_template_is_told_what_to_do(renderer: ChatRenderer) -> None:
    with pytest.raises(InvalidField, match=r"chat_template\.jinja"):
        await renderer.render(ChatFormat(), HELLO)
    with pytest.raises(InvalidField, match="only the chat templates rag, tool_use"):
        await renderer.render(ChatFormat(templates={"tool_use": "", "rag": ""}), HELLO)


async def test_an_invalid_template_is_the_models_fault(renderer: ChatRenderer) -> None:
    with pytest.raises(ModelUnsupported, match="line 2: Encountered unknown tag 'bad'"):
        await renderer.render(chat_format("ok\n{% bad %}"), HELLO)
    with pytest.raises(ModelUnsupported, match="unreadable"):
        await renderer.render(ChatFormat(problem="unreadable"), HELLO)


@pytest.mark.parametrize(
    "template", [ENDLESS, "{{ 10 ** (10 ** 10) }}"], ids=["a loop", "one operation"]
)
async def test_a_template_without_end_is_ended(renderer: ChatRenderer, template: str) -> None:
    good = chat_format("{{ messages[0].content }}")
    hostile = asyncio.create_task(problem(renderer, template))
    # The event loop is free meanwhile.
    await asyncio.sleep(0)
    assert not hostile.done()
    assert "more than 0.5 s of CPU time" in await hostile
    assert await renderer.render(good, HELLO) == "hé 😀"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 10 }}",
        DOUBLING,
    ],
    ids=["at once", "by doubling"],
)
async def test_a_template_that_takes_too_much_memory_is_refused(template: str) -> None:
    renderer = ChatRenderer()
    try:
        assert "1024 MiB of memory" in await problem(renderer, template)
        assert await renderer.render(chat_format("ok"), HELLO) == "ok"
    finally:
        renderer.close()


async def test_a_template_that_writes_too_much_is_refused() -> None:
    renderer = ChatRenderer()
    try:
        assert "67108864 characters" in await problem(renderer, "{{ 'ab' * 40000000 }}")
    finally:
        renderer.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how large a process is")
async def test_a_process_that_has_become_large_is_replaced() -> None:
    renderer = ChatRenderer()
    try:
        assert await renderer.render(chat_format("{{ 'ab' * 999 }}"), HELLO)
        first = renderer._worker
        assert first
        long = "{% set n = 30000000 %}{{ 'ab' * n }}"
        assert len(await renderer.render(chat_format(long), HELLO)) == 60_000_000
        assert first.returncode is not None
        assert await renderer.render(chat_format("ok"), HELLO) == "ok"
    finally:
        renderer.close()


async def test_a_crash_of_the_process_is_told_and_repaired(renderer: ChatRenderer) -> None:
    assert await renderer.render(chat_format("ok"), HELLO) == "ok"
    assert renderer._worker
    renderer._worker.kill()
    with pytest.raises(GenerationFailed, match="exit code -9"):
        await renderer.render(chat_format("ok"), HELLO)
    assert await renderer.render(chat_format("ok"), HELLO) == "ok"


async def test_close_ends_the_process_and_what_is_being_rendered() -> None:
    renderer = ChatRenderer()
    running = asyncio.create_task(renderer.render(chat_format(ENDLESS), HELLO))
    await eventually(lambda: renderer._worker is not None)
    worker = renderer._worker
    assert worker
    renderer.close()
    assert worker.returncode is not None
    with pytest.raises(ShuttingDown):
        await running
    with pytest.raises(ShuttingDown):
        await renderer.render(chat_format("ok"), HELLO)


def test_the_process_ends_with_its_parent() -> None:
    """The end of standard input ends the process, also with SIGINT ignored."""
    command = [sys.executable, "-P", "-m", "runner_server.chat.worker"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ)
    assert worker.stdin
    worker.stdin.close()
    assert worker.wait(60) == 0


async def test_a_python_template_gets_arguments_of_calls_as_text(
    renderer: ChatRenderer, tmp_path: Any
) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "def apply_chat_template(messages, add_generation_prompt, tools=None, **kwargs):\n"
        "    return repr((messages[0]['tool_calls'][0]['function'], tools, kwargs))\n"
    )
    format_ = ChatFormat(python_template=str(file), special_tokens={"bos_token": "<s>"})
    message = {"role": "assistant", "tool_calls": [call(place="Ülm")]}
    text = await renderer.render(format_, Conversation([message], None, {"x": 1}))
    function = {"name": "get_weather", "arguments": '{"place": "Ülm"}'}
    assert text == repr((function, None, {"x": 1}))
