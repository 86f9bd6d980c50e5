"""The judge of ``make interop`` knows the rules for streams of completions and answers."""

from __future__ import annotations

import pytest

from interop.judge import problems
from support.judged import Json, call, changed, scenario

PROMPT = scenario(
    [call("Completion", request={"prompt": "a fox", "prompt_logprobs": 0})], {"token_ids": [5]}
)
PROMPT_COMPLETED = {
    "code": "OK",
    "messages": [
        {"promptLogprobs": [{"token_id": 6, "text": " fox", "logprob": -1}]},
        {"tokenIds": [5], "done": True, "evalCount": 1, "promptEvalCount": 2},
    ],
}
SCHEMA = '{"properties": {"a": {"type": "integer"}}, "required": ["a"]}'
CONSTRAINED = scenario(
    [call("Completion", request={"prompt": "x", "constraint": {"json_schema": SCHEMA}})], {}
)
OBEYED = {
    "code": "OK",
    "messages": [
        {"content": '{"a": 1}', "tokenIds": [5], "done": True, "evalCount": 1}
        | {"constraintSatisfied": True}
    ],
}
CHAT = scenario(
    [call("Chat")],
    {"text": "So.", "reasoning": "Hm", "tool_calls": [{"name": "f", "arguments": {"x": [1]}}] * 2},
)
ANSWERED = {
    "code": "OK",
    "messages": [
        {"reasoning": "H", "tokenIds": [5]},
        {"reasoning": "m", "content": "So.", "tokenIds": [6, 7]},
        {
            "toolCalls": [
                {"id": "1", "name": "f", "arguments": '{"x":[1]}'},
                {"id": "2", "name": "f", "arguments": '{"x": [1]}'},
            ],
            "tokenIds": [8],
            "done": True,
            "evalCount": 4,
            "reasoningEvalCount": 2,
        },
    ],
}
CALLS = ("messages", 2, "toolCalls")
TOOLS = [{"name": "f", "parameters": '{"properties": {"x": {"type": "array"}}}'}, {"name": "g"}]
REQUIRED = scenario(
    [call("Chat", request={"tools": TOOLS, "tool_choice": "TOOL_CHOICE_REQUIRED"})],
    {"tool_calls": [{"name": "f", "arguments": {"x": [1]}}]},
)
CALLED = {
    "code": "OK",
    "messages": [
        {
            "toolCalls": [{"id": "1", "name": "f", "arguments": '{"x":[1]}'}],
            "tokenIds": [8],
            "done": True,
            "evalCount": 1,
            "constraintSatisfied": True,
        },
    ],
}
ANY_SCHEMA = ("steps", 0, "request", "tools", 0, "parameters")


@pytest.mark.parametrize(
    ("wanted", "answer"),
    [(PROMPT, PROMPT_COMPLETED), (CONSTRAINED, OBEYED), (CHAT, ANSWERED), (REQUIRED, CALLED)],
)
def test_a_right_answer_has_no_problems(wanted: Json, answer: Json) -> None:
    assert problems(wanted, [answer]) == []


@pytest.mark.parametrize(
    ("wanted", "answer", "complaint"),
    [
        (
            changed(PROMPT, "steps", 0, "request", to={}),
            PROMPT_COMPLETED,
            "no log probabilities of the prompt",
        ),
        (PROMPT, changed(PROMPT_COMPLETED, "messages", 1, "promptEvalCount", to=3), "of 2 tokens"),
        (
            PROMPT,
            changed(PROMPT_COMPLETED, "messages", 0, "promptLogprobs", 0, "text", to="dog"),
            "texts of the prompt 'a fox', got 'dog'",
        ),
        (
            PROMPT,
            changed(PROMPT_COMPLETED, "messages", 0, "promptLogprobs", 0, "logprob", to=1),
            "logarithms",
        ),
        (
            CONSTRAINED,
            changed(OBEYED, "messages", 0, "content", to='{"a": "b"}'),
            "satisfied False",
        ),
        (CONSTRAINED, changed(OBEYED, "messages", 0, "content", to='{"a": 1'), "satisfied False"),
        (CONSTRAINED, changed(OBEYED, "messages", 0, "constraintSatisfied", to=False), "got False"),
        (CONSTRAINED, changed(OBEYED, "messages", 0, "constraintSatisfied", to=None), "got None"),
        (
            changed(CONSTRAINED, "steps", 0, "request", to={}),
            OBEYED,
            "no constraint_satisfied, got True",
        ),
        (CHAT, changed(ANSWERED, "messages", 0, "reasoning", to=""), "reasoning: expected 'Hm'"),
        (CHAT, changed(ANSWERED, "messages", 1, "content", to="No."), "text: expected 'So.'"),
        (CHAT, changed(ANSWERED, "messages", 2, "reasoningEvalCount", to=0), "is 0, with"),
        (CHAT, changed(ANSWERED, "messages", 2, "reasoningEvalCount", to=5), "is 5, with"),
        (CHAT, changed(ANSWERED, *CALLS, to=[]), "tool calls: expected"),
        (CHAT, changed(ANSWERED, *CALLS, 0, "arguments", to="{}"), "tool calls: expected"),
        (CHAT, changed(ANSWERED, *CALLS, 0, "arguments", to="{"), "arguments are no JSON"),
        (CHAT, changed(ANSWERED, *CALLS, 0, "id", to=""), "an id for every call"),
        (CHAT, changed(ANSWERED, *CALLS, 0, "id", to="2"), "an id for every call"),
        (CHAT, changed(ANSWERED, "messages", 2, "done", to=False), "done in the last"),
        (REQUIRED, changed(CALLED, "messages", 0, "toolCalls", to=[]), "tools' schemas, got []"),
        (REQUIRED, changed(CALLED, "messages", 0, "content", to="So."), "True of 'So.'"),
        (REQUIRED, changed(CALLED, "messages", 0, "constraintSatisfied", to=False), "and False of"),
        (REQUIRED, changed(CALLED, "messages", 0, "constraintSatisfied", to=None), "and None of"),
        (changed(REQUIRED, *ANY_SCHEMA, to='{"required": ["y"]}'), CALLED, "tools' schemas, got"),
        (
            changed(REQUIRED, "steps", 0, "request", "tool_name", to="g"),
            CALLED,
            "tools' schemas, got",
        ),
    ],
)
def test_a_wrong_answer_is_found(wanted: Json, answer: Json, complaint: str) -> None:
    found = "; ".join(problems(wanted, [answer]))
    assert found.startswith("step 0, call ")
    assert complaint in found


@pytest.mark.parametrize(
    ("constraint", "text", "is_obeyed"),
    [
        ({"regex": "[a-c]{2}"}, "ab", True),
        ({"regex": "[a-c]{2}"}, "abc", False),
        ({"choice": {"texts": ["é", "è"]}}, "è", True),
        ({"choice": {"texts": ["é", "è"]}}, "e", False),
        ({"json_object": {}}, '{"a": []}', True),
        ({"json_object": {}}, "[]", False),
    ],
)
def test_the_judge_knows_what_obeys_a_constraint(
    constraint: Json, text: str, *, is_obeyed: bool
) -> None:
    wanted = changed(CONSTRAINED, "steps", 0, "request", "constraint", to=constraint)
    said = changed(OBEYED, "messages", 0, "content", to=text)
    for answer in (True, False):
        said = changed(said, "messages", 0, "constraintSatisfied", to=answer)
        assert (problems(wanted, [said]) == []) == (answer == is_obeyed)
