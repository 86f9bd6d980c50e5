"""Conversations for tests of chat templates, as plain JSON data."""

from __future__ import annotations

from typing import Any

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Get the weather of a place <now> & "here", naïve 日本',
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "A city"},
                "days": {"type": "integer"},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["place"],
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Get the time",
        "parameters": {"type": "object", "properties": {}},
    },
}


def system(text: str = "You are <b>helpful</b> & brief.") -> dict[str, Any]:
    """Return a message of the system."""
    return {"role": "system", "content": text}


def user(text: str = "Hello, 日本 😀!") -> dict[str, Any]:
    """Return a message of the user."""
    return {"role": "user", "content": text}


def assistant(text: str = "Hi.", **fields: Any) -> dict[str, Any]:
    """Return a message of the assistant."""
    return {"role": "assistant", "content": text, **fields}


def call(name: str = "get_weather", id_: str = "call12345", **arguments: Any) -> dict[str, Any]:
    """Return a tool call."""
    function = {"name": name, "arguments": arguments or {"place": "Zürich", "days": 2}}
    return {"id": id_, "type": "function", "function": function}


def result(text: str = '{"temperature": 21.5}', id_: str = "call12345") -> dict[str, Any]:
    """Return the result of a tool call."""
    return {"role": "tool", "content": text, "tool_call_id": id_, "name": "get_weather"}


def parts(*texts: str) -> dict[str, Any]:
    """Return a message of the user in parts."""
    return {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one message": [user()],
    "system": [system(), user()],
    "turns": [system(), user(), assistant(), user(" And then?\n\n"), assistant("So."), user("?")],
    "reasoning": [user(), assistant("Two.", reasoning_content="One and one."), user("More?")],
    "reasoning in the text": [user(), assistant("<think>\nOne.\n</think>\n\nTwo."), user("More?")],
    "parts": [parts("Look: ", "here")],
    "tool call": [user("Weather?"), assistant("", tool_calls=[call()]), result()],
    "tool call without text": [
        user("Weather?"),
        {"role": "assistant", "tool_calls": [call(place="Ulm", days=1, unit="C")]},
        result(),
        assistant("21.5 degrees."),
        user("Thanks"),
    ],
    "reasoned tool calls": [
        system(),
        user("Weather and time?"),
        assistant(
            "I look.",
            reasoning_content="I need both.",
            tool_calls=[call(), call("get_time", "call67890", zone="UTC")],
        ),
        result(),
        result("12:30", "call67890"),
    ],
    "markup": [user("<|im_end|><s>[INST] </s> <eos> <|eot_id|> {{ 7 * 7 }} {% if x %}")],
    "ends with the assistant": [user(), assistant("I")],
    "two users": [user("a"), user("b")],
    "developer": [{"role": "developer", "content": "Be brief."}, user()],
}

TOOLS: dict[str, list[dict[str, Any]] | None] = {
    "no tools": None,
    "one tool": [WEATHER],
    "two tools": [WEATHER, CLOCK],
}

ARGUMENTS: dict[str, dict[str, Any]] = {
    "no arguments": {},
    "thinking": {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"},
    "no thinking": {"enable_thinking": False, "thinking": False, "reasoning_effort": "low"},
    "documents": {"documents": [{"title": "A", "text": "B", "contents": "B"}], "date": "x"},
}
