"""Translation of requests and answers, without a server."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.http.ollama.reasoning import decide_reasoning
from runner_common.http.ollama.translation.answers import Answer, Stopwatch
from runner_common.http.ollama.translation.embeddings import (
    read_embed,
    read_old_embedding,
    unit_vector,
)
from runner_common.http.ollama.translation.fields import Fields
from runner_common.http.ollama.translation.keep_alive import read_keep_alive
from runner_common.http.ollama.translation.options import TOLERATED, read_options
from runner_common.http.ollama.translation.requests import read_chat, read_generate
from runner_common.serving.interceptor import UnreadableRequestError
from support.http_child import DEMO

HELLO = [{"role": "user", "content": "Hello"}]
DEEP: Any = json.loads("[" * 900 + "]" * 900)


def refused(error: pytest.ExceptionInfo[UnreadableRequestError]) -> str:
    """Return the path of the refused field."""
    ((path, _),) = error.value.violations
    return path


def options(**values: Any) -> pb.CompletionOptions:
    return read_options(Fields(values, "options"))[0]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *((None, None), (0, 0), (60, 60), (1.5, 1.5), (-1, math.inf), (1e300, math.inf)),
        *(("5m", 300), ("1h30m", 5400), ("300ms", 0.3), ("1.5h", 5400), ("0", 0), ("0s", 0)),
        *(("-1m", math.inf), ("+2s", 2), (".5s", 0.5), ("1\u00b5s", 1e-6), ("9999999h", math.inf)),
    ],
)
def test_keep_alive_is_a_number_or_a_duration(value: object, seconds: float | None) -> None:
    found = read_keep_alive(Fields({"keep_alive": value}))
    assert found == (seconds if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("value", ["5", "", "m", "5 m", "5x", "-1", True, [], "1" * 99 + "s"])
def test_any_other_keep_alive_is_refused(value: object) -> None:
    with pytest.raises(UnreadableRequestError) as error:
        read_keep_alive(Fields({"keep_alive": value}))
    assert refused(error) == "keep_alive"


def test_options_are_translated() -> None:
    found = options(
        temperature=0, top_k=20.0, min_p=0.5, seed=2**62, num_predict=7, stop=["a"], top_p=None
    )
    assert found == pb.CompletionOptions(
        temperature=0, top_k=20, min_p=0.5, seed=2**62, num_predict=7, stop=["a"]
    )


@pytest.mark.parametrize("values", [{"seed": -1}, {"num_predict": -1}, {"num_predict": -2}])
def test_the_values_for_none_leave_an_option_unset(values: dict[str, int]) -> None:
    assert options(**values) == pb.CompletionOptions()


def test_options_without_an_effect_are_tolerated() -> None:
    off = {"mirostat": 0, "tfs_z": 1.0, "typical_p": 1, "vocab_only": False}
    assert options(**dict.fromkeys(TOLERATED, 3), **off) == pb.CompletionOptions()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("mirostat", 1), ("tfs_z", 0.9), ("typical_p", 0.5), ("penalize_newline", False)),
        *(("logits_all", True), ("f16_kv", True), ("tempreature", 1), ("num_thread", "many")),
        *(("temperature", "hot"), ("temperature", True), ("temperature", 1e300)),
        *(("temperature", math.inf), ("top_k", 1.5), ("top_k", 2**40), ("seed", 2**63)),
        *(("top_k", math.inf), ("seed", "1"), ("num_predict", 0), ("num_predict", -3)),
        *(("num_ctx", 0), ("num_ctx", "4k"), ("stop", "a"), ("stop", DEEP)),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UnreadableRequestError) as error:
        options(**{name: value})
    assert refused(error).partition("[")[0] == f"options.{name}"


def test_a_chat_is_translated() -> None:
    call = {"function": {"name": "f", "arguments": {"x": 1, "y": "é"}}}
    body = {
        "model": "m",
        "messages": [
            {"role": "SYSTEM", "content": "Be brief."},
            {"role": "user"},
            {"role": "assistant", "thinking": "Hm.", "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_name": "f", "tool_call_id": "a"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": None}}}],
        "format": "json",
        "think": "max",
        "stream": False,
        "logprobs": True,
        "options": {"num_ctx": 5},
    }
    found = read_chat(body)
    assert isinstance(found.request, pb.ChatRequest)
    assert (found.model, found.num_ctx, found.think, found.effort) == ("m", 5, True, "high")
    assert not found.is_stream
    system, user, assistant, tool = found.request.messages
    assert (system.role, system.content) == (pb.ROLE_SYSTEM, "Be brief.")
    assert user.HasField("content")
    assert not assistant.HasField("content")
    assert assistant.reasoning == "Hm."
    assert assistant.tool_calls[0].arguments == '{"x": 1, "y": "é"}'
    assert (tool.name, tool.tool_call_id) == ("f", "a")
    assert found.request.tools[0].parameters == '{"a": null}'
    assert found.request.constraint.HasField("json_object")
    assert found.request.logprobs == 0


def test_a_prompt_becomes_a_conversation_unless_it_is_raw() -> None:
    found = read_generate({"model": "m", "prompt": "Hi", "system": "S"}).request
    assert isinstance(found, pb.ChatRequest)
    assert [each.content for each in found.messages] == ["S", "Hi"]
    raw = read_generate({"model": "m", "prompt": "Hi", "raw": True, "think": False}).request
    assert raw == pb.CompletionRequest(prompt="Hi", options=pb.CompletionOptions())


@pytest.mark.parametrize("body", [{}, {"prompt": ""}, {"prompt": None, "raw": True}])
def test_without_a_prompt_nothing_is_generated(body: dict[str, Any]) -> None:
    assert read_generate({"model": "m", **body}).request is None
    assert read_chat({"model": "m", "messages": []}).request is None


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("model", {"model": ""}),
        ("model", {"model": None}),
        ("model", {"model": 3}),
        ("messages", {"messages": "Hi"}),
        ("messages[0]", {"messages": ["Hi"]}),
        ("messages[0].role", {"messages": [{"content": "Hi"}]}),
        ("messages[0].role", {"messages": [{"role": "robot"}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}),
        ("messages[0].images", {"messages": [{"role": "user", "images": ["aGk="]}]}),
        ("messages[0].color", {"messages": [{"role": "user", "color": "red"}]}),
        (
            "messages[0].tool_calls[0].function",
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]},
        ),
        (
            "messages[0].tool_calls[0].function.arguments",
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}
                ]
            },
        ),
        ("tools[0].type", {"tools": [{"type": "retrieval"}]}),
        ("tools[0].function", {"tools": [{"type": "function"}]}),
        ("format", {"format": "xml"}),
        ("format", {"format": True}),
        ("format", {"format": {"const": math.inf}}),
        ("think", {"think": 1}),
        ("think", {"think": "hard"}),
        ("top_logprobs", {"top_logprobs": 21}),
        ("stream", {"stream": "yes"}),
        ("shift", {"shift": True}),
        ("options", {"options": []}),
        ("colour", {"colour": "red"}),
    ],
)
def test_a_chat_is_refused_by_the_path_of_a_field(path: str, body: dict[str, Any]) -> None:
    with pytest.raises(UnreadableRequestError) as error:
        read_chat({"model": "m", "messages": HELLO, **body})
    assert refused(error) == path


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("system", {"raw": True, "system": "S"}),
        ("think", {"raw": True, "think": True}),
        *((name, {name: "x"}) for name in ("suffix", "template", "context", "images", "width")),
        ("_debug_render_only", {"_debug_render_only": True}),
    ],
)
def test_a_prompt_is_refused_by_the_path_of_a_field(path: str, body: dict[str, Any]) -> None:
    with pytest.raises(UnreadableRequestError) as error:
        read_generate({"model": "m", "prompt": "Hi", **body})
    assert refused(error) == path


def test_empty_values_of_unsupported_fields_are_accepted() -> None:
    empty = {"suffix": "", "template": "", "context": [], "images": [], "shift": False}
    assert read_generate({"model": "m", "prompt": "Hi", "format": "", **empty}).request


def test_a_schema_that_is_too_deep_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"not": schema}
    with pytest.raises(UnreadableRequestError) as error:
        read_chat({"model": "m", "messages": HELLO, "format": schema})
    assert refused(error) == "format"


@pytest.mark.parametrize(
    ("given", "texts"), [("a", ["a"]), ("", []), ([], []), (["a", "b"], ["a", "b"]), (None, [])]
)
def test_texts_to_embed_are_one_or_several(given: object, texts: list[str]) -> None:
    assert read_embed({"model": "m", "input": given}).texts == texts


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("input", {"input": 3}),
        ("input[1]", {"input": ["a", 1]}),
        ("dimensions", {"dimensions": -1}),
    ],
)
def test_texts_to_embed_are_refused_by_the_path_of_a_field(path: str, body: dict[str, Any]) -> None:
    with pytest.raises(UnreadableRequestError) as error:
        read_embed({"model": "m", **body})
    assert refused(error) == path


def test_the_old_request_has_one_text() -> None:
    assert read_old_embedding({"model": "m", "prompt": "a"}).texts == ["a"]


def test_vectors_get_length_one_after_they_are_cut() -> None:
    assert unit_vector([3.0, 4.0, 12.0], 2) == [0.6, 0.8]
    assert unit_vector([0.0, 0.0], None) == [0.0, 0.0]


def test_an_answer_in_parts_leaves_out_progress() -> None:
    answer = Answer("m", is_chat=True, stopwatch=Stopwatch())
    progress = pb.PromptProgress(evaluated_count=1, total_count=2)
    assert answer.part(pb.ChatResponse(prompt_progress=progress)) is None
    call = pb.ToolCall(id="a", name="f", arguments='{"x": 1}')
    first = answer.part(pb.ChatResponse(content="Hi", tool_calls=[call]))
    second = answer.part(pb.ChatResponse(reasoning="Hm", tool_calls=[call]))
    assert first
    assert second
    assert first["message"]["content"] == "Hi"
    assert second["message"]["thinking"] == "Hm"
    (given,) = second["message"]["tool_calls"]
    assert given == {"id": "a", "function": {"index": 1, "name": "f", "arguments": {"x": 1}}}


def test_the_whole_answer_has_all_parts_and_the_counts() -> None:
    answer = Answer("m", is_chat=False, stopwatch=Stopwatch())
    logprob = pb.TokenLogprob(text="A", logprob=-1.0, bytes=b"A", top=[pb.TopLogprob(text="B")])
    assert answer.add(pb.CompletionResponse(content="A", logprobs=[logprob])) is None
    last = pb.CompletionResponse(
        content="B", done=True, done_reason=pb.DONE_REASON_LENGTH, prompt_eval_count=3, eval_count=2
    )
    last.eval_duration.FromNanoseconds(1_500_000_001)
    whole = answer.add(last)
    assert whole
    assert (whole["response"], whole["done_reason"]) == ("AB", "length")
    assert (whole["prompt_eval_count"], whole["eval_count"]) == (3, 2)
    assert whole["eval_duration"] == 1_500_000_001
    assert whole["logprobs"] == [
        {
            "token": "A",
            "logprob": -1.0,
            "bytes": [65],
            "top_logprobs": [{"token": "B", "logprob": 0.0, "bytes": []}],
        }
    ]


@pytest.mark.parametrize(
    ("think", "effort", "template", "arguments"),
    [
        (True, "", "{% if enable_thinking %}", {"enable_thinking": True}),
        (False, "", "{% if not thinking %}", {"enable_thinking": False, "thinking": False}),
        (True, "low", "{{ message.thinking }}<thinking>", {"enable_thinking": True}),
        (
            True,
            "low",
            "{{ reasoning_effort }}",
            {"enable_thinking": True, "reasoning_effort": "low"},
        ),
        # The one that mlx_lm has in Python for DeepSeek V3.2 takes no other argument.
        (True, "high", "", {"enable_thinking": True}),
    ],
)
async def test_templates_get_the_arguments_that_they_have(
    tmp_path: Path, template: str, arguments: dict[str, Any], effort: str, *, think: bool
) -> None:
    shutil.copytree(DEMO, tmp_path / "model")
    config = tmp_path / "model" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    model = pb.Model(path=str(tmp_path / "model"), capabilities=pb.Capabilities(reasoning=True))
    found = read_chat({"model": "m", "messages": HELLO, "think": effort or think})
    await decide_reasoning(found, model)
    assert isinstance(found.request, pb.ChatRequest)
    assert json.loads(found.request.chat_template_kwargs) == arguments
    assert found.request.HasField("reasoning_budget") is not think
