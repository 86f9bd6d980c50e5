"""Requests to the SMG gateway as OpenAI's clients make them."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai

from support.gateway import Fleet

DEADLINE_SECONDS = 60.0


def client(found: Fleet) -> Any:
    """Return an OpenAI client of a gateway, without retries of failed requests."""
    url = f"http://127.0.0.1:{found.port}/v1"
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=DEADLINE_SECONDS)


def chat(ai: Any, count: int = 12, content: str = "Tell me a story.", **options: Any) -> Any:
    """Ask for a chat."""
    messages = [{"role": "user", "content": content}]
    return ai.chat.completions.create(
        model="model", messages=messages, max_completion_tokens=count, **options
    )


def text_of(chunks: Any) -> str:
    """Return the text of a stream."""
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def kill_one_of_two(found: Fleet, ai: openai.OpenAI) -> None:
    """Kill the first of two runners under 32 requests, and check what becomes of them.

    The two streams on the killed runner end with an error; all others are served.
    """
    begun = threading.Barrier(5)
    killed = threading.Event()
    doomed = found.runners[0]

    def stream(_number: int) -> str:
        """Read a stream that has begun when the runner dies; round robin gives two to each."""
        chunks = iter(chat(ai, 900, stream=True, extra_body={"ignore_eos": True}))
        while not text_of([next(chunks)]):
            pass
        begun.wait(DEADLINE_SECONDS)
        try:
            rest = list(chunks)
        except openai.APIError as error:
            return type(error).__name__
        return str([choice.finish_reason for chunk in rest for choice in chunk.choices][-1])

    def whole(number: int) -> str:
        assert killed.wait(DEADLINE_SECONDS)
        answer = chat(ai, 20, content=f"Story {number}", extra_body={"ignore_eos": True})
        return str(answer.choices[0].finish_reason)

    with ThreadPoolExecutor(32) as pool:
        streams = [pool.submit(stream, number) for number in range(4)]
        others = [pool.submit(whole, number) for number in range(28)]
        begun.wait(DEADLINE_SECONDS)
        doomed.process.send_signal(signal.SIGKILL)
        killed.set()
        ends = sorted(future.result(DEADLINE_SECONDS) for future in streams)
        assert ends == ["APIError", "APIError", "length", "length"]
        assert {future.result(DEADLINE_SECONDS) for future in others} == {"length"}
