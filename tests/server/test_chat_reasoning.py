"""Chat tells the reasoning of an answer apart."""

from __future__ import annotations

from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from support.fakes import CHAT_TEMPLATE, FakeBackend, chat_format, says
from support.fakes import THINKING as MARKERS
from support.harness import Server, StartServer

HELLO = pb.ChatMessage(role=pb.ROLE_USER, content="hé")


async def start(start_server: StartServer, reply: str, template: str = CHAT_TEMPLATE) -> Server:
    """Start a server whose model reasons and generates ``reply``, one byte a token."""
    format_ = chat_format(template, answer=MARKERS)
    server = await start_server(FakeBackend(reply=says(reply), chat=format_))
    assert (await server.load()).model.capabilities.reasoning
    return server


async def answer(server: Server, **options: Any) -> list[pb.ChatResponse]:
    """Return the messages of an answer."""
    request = pb.ChatRequest(messages=[HELLO], options=pb.CompletionOptions(**options))
    return [message async for message in server.stub.Chat(request)]


def joined(messages: list[pb.ChatResponse]) -> tuple[str, str]:
    """Return reasoning and content."""
    return (
        "".join(message.reasoning for message in messages),
        "".join(message.content for message in messages),
    )


async def test_reasoning_and_content_come_apart(start_server: StartServer) -> None:
    server = await start(start_server, "<think>日本?</think>Ja é.")
    messages = await answer(server)
    assert joined(messages) == ("日本?", "Ja é.")
    last = messages[-1]
    assert last.reasoning_eval_count == len("日本?</think>".encode()) + 1
    assert last.eval_count == len("<think>日本?</think>Ja é.".encode()) + 1
    assert not any(message.reasoning_eval_count for message in messages[:-1])


async def test_a_template_may_open_the_reasoning(start_server: StartServer) -> None:
    server = await start(start_server, "So</think>Yes", CHAT_TEMPLATE + "<think>\n")
    assert joined(await answer(server)) == ("So", "Yes")


async def test_reasoning_that_is_cut_off_is_complete(start_server: StartServer) -> None:
    server = await start(start_server, "<think>So it is</thinking")
    messages = await answer(server, num_predict=21)
    assert joined(messages) == ("So it is</thin", "")
    assert messages[-1].done_reason == pb.DONE_REASON_LENGTH


@pytest.mark.parametrize("stop", ["it", "</think>"])
async def test_stop_strings_see_the_whole_text(start_server: StartServer, stop: str) -> None:
    server = await start(start_server, "<think>So it is</think>Yes")
    messages = await answer(server, stop=[stop])
    assert messages[-1].stop_match == stop
    expected = "<think>So it is</think>Yes".partition(stop)[0].removeprefix("<think>")
    assert joined(messages) == (expected, "")


async def test_a_model_without_markers_reasons_in_its_text(loaded: Server) -> None:
    assert not (await loaded.status()).model.capabilities.reasoning
    loaded.backend.reply = says("<think>a</think>b")
    assert joined(await answer(loaded)) == ("", "<think>a</think>b")


async def test_earlier_reasoning_reaches_the_template(start_server: StartServer) -> None:
    template = "{% for m in messages %}{{ m.reasoning_content }};{{ m.content }}.{% endfor %}"
    server = await start(start_server, "x", template)
    turn = pb.ChatMessage(role=pb.ROLE_ASSISTANT, reasoning="why", content="b")
    request = pb.RenderChatRequest(messages=[HELLO, turn])
    assert (await server.stub.RenderChat(request)).prompt == ";hé.why;b."
