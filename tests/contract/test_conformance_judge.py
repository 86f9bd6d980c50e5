"""The judge of ``make interop`` accepts right answers and finds the fault of wrong ones."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import pytest

from interop.judge import disagreements, problems, read_output
from interop.languages import SCENARIOS
from interop.pings import SILENCE_SECONDS, Pings
from support.judged import Json, call, changed, scenario

KEYS = {
    "code",
    "reason",
    "metadata",
    "violations",
    "retry_seconds",
    "message_has",
    "messages",
    "last",
    "text",
    "text_lacks",
    "token_ids",
    "logprobs",
    "reasoning",
    "tool_calls",
    "same_as",
    "differs_from",
    "statuses",
    "pings",
}


def message(content: str, *ids: int, **more: Any) -> Json:
    token = {"text": content, "bytes": b64encode(content.encode()).decode(), "logprob": -0.5}
    logprobs = [{"token_id": each, "top": [{"token_id": each} | token]} | token for each in ids]
    return {"content": content, "tokenIds": list(ids), "logprobs": logprobs} | more


COMPLETION = scenario(
    [call("Completion")],
    {
        "messages": {"at_least": 2},
        "text": "a fox",
        "text_lacks": "dog",
        "token_ids": [5, 6],
        "logprobs": 1,
        "last": {"done_reason": "DONE_REASON_STOP", "prompt_eval_duration": {"at_least": 60}},
    },
)
COMPLETED = {
    "code": "OK",
    "messages": [
        message("a ", 5),
        message(
            "fox",
            6,
            done=True,
            doneReason="DONE_REASON_STOP",
            evalCount=2,
            promptEvalDuration="60.2s",
        ),
    ],
}
REFUSAL = scenario(
    [call("Completion")],
    {
        "code": "RESOURCE_EXHAUSTED",
        "reason": "QUEUE_FULL",
        "message_has": "wait",
        "metadata": {"queuedCount": "1"},
        "violations": ["options.top_k"],
        "retry_seconds": {"above": 0},
    },
)
REFUSED = {
    "code": "RESOURCE_EXHAUSTED",
    "message": "too many wait",
    "messages": [],
    "details": {
        "reason": "QUEUE_FULL",
        "domain": "mlxrunner.v1",
        "metadata": {"queuedCount": "1"},
        "violations": [{"field": "options.top_k", "description": "no"}],
        "retry_seconds": 0.5,
    },
}
UNLOADED = scenario([call("Completion")], {"code": "RESOURCE_EXHAUSTED", "reason": "QUEUE_FULL"})
LOAD = scenario(
    [call("Load", watch_status=True)],
    {
        "last": {"model": {"weight_bytes": {"at_least": 1}}},
        "statuses": {
            "seen": {"state": "STATE_LOADING", "progress": {"at_least": 1}},
            "last": {"state": "STATE_ACTIVE", "progress": 100},
        },
    },
)
LOADED = {
    "code": "OK",
    "messages": [{"model": {"weight_bytes": "700"}}],
    "statuses": [
        {"state": "STATE_LOADING", "progress": 0},
        {"state": "STATE_LOADING", "progress": 40},
        {"state": "STATE_ACTIVE", "progress": 100},
    ],
}
FIRST = ("messages", 0, "logprobs", 0)
UNLIKELY = {"token_id": 9, "text": "y", "logprob": -2}
SOUND = [(COMPLETION, COMPLETED), (REFUSAL, REFUSED), (LOAD, LOADED)]


@pytest.mark.parametrize(("wanted", "answer"), SOUND)
def test_a_right_answer_has_no_problems(wanted: Json, answer: Json) -> None:
    assert problems(wanted, [answer]) == []


@pytest.mark.parametrize(
    ("wanted", "answer", "complaint"),
    [
        (COMPLETION, REFUSED, "expected OK, got RESOURCE_EXHAUSTED: too many wait"),
        (COMPLETION, changed(COMPLETED, "messages", 0, "content", to="the "), "text: expected"),
        (COMPLETION, changed(COMPLETED, "messages", 0, "content", to="dog"), "no 'dog'"),
        (COMPLETION, changed(COMPLETED, "messages", 0, "tokenIds", to=[7]), "token ids: expected"),
        (COMPLETION, changed(COMPLETED, "messages", 0, "logprobs", to=[]), "probabilities of"),
        (COMPLETION, changed(COMPLETED, *FIRST, "top", to=[]), "1 altern"),
        (COMPLETION, changed(COMPLETED, *FIRST, "logprob", to=1), "logarithms"),
        (COMPLETION, changed(COMPLETED, *FIRST, "logprob", to=-1), "the same of a token and"),
        (COMPLETION, changed(COMPLETED, *FIRST, "text", to="y"), "the same of a token and"),
        (COMPLETION, changed(COMPLETED, *FIRST, "text", to="an"), "texts of tokens to be 'a fox'"),
        (COMPLETION, changed(COMPLETED, *FIRST, "bytes", to="eA=="), "the same of a token and"),
        (
            COMPLETION,
            changed(COMPLETED, *FIRST, "bytes", to="eA=="),
            "bytes of tokens to be 'a fox'",
        ),
        (COMPLETION, changed(COMPLETED, *FIRST, "top", 0, to=UNLIKELY), "no token more likely"),
        (COMPLETION, changed(COMPLETED, *FIRST, "candidates", to=[UNLIKELY]), "candidates [], got"),
        (COMPLETION, changed(COMPLETED, "messages", 0, "done", to=True), "done in the last"),
        (COMPLETION, changed(COMPLETED, "messages", 1, "done", to=False), "done in the last"),
        (COMPLETION, changed(COMPLETED, "messages", 1, "evalCount", to=3), "eval_count is 3"),
        (COMPLETION, changed(COMPLETED, "messages", 1, "doneReason", to=2), "DONE_REASON_LENGTH"),
        (
            COMPLETION,
            changed(COMPLETED, "messages", 1, "promptEvalDuration", to="59s"),
            "expected at least 60, got '59s'",
        ),
        (
            COMPLETION,
            changed(COMPLETED, "messages", 0, "nonsense", to=1),
            "not a CompletionResponse",
        ),
        (COMPLETION, changed(COMPLETED, "messages", 0, to="text"), "not a CompletionResponse"),
        (COMPLETION, changed(COMPLETED, "messages", to=[]), "messages: expected at least 2"),
        (COMPLETION, changed(COMPLETED, "details", to={"reason": "BUSY"}), "expected no details"),
        (COMPLETION, {"broken": "no such thing"}, "could not do it: no such thing"),
        (COMPLETION, {}, "expected OK, got None"),
        (
            changed(COMPLETION, "steps", 0, "request", to={"logprob_token_ids": [5]}),
            COMPLETED,
            "expected candidates [5], got []",
        ),
        (REFUSAL, COMPLETED, "expected RESOURCE_EXHAUSTED, got OK"),
        (REFUSAL, changed(REFUSED, "message", to=""), "no message"),
        (REFUSAL, changed(REFUSED, "message", to="go away"), "expected 'wait'"),
        (REFUSAL, changed(REFUSED, "messages", to=COMPLETED["messages"]), "message with done"),
        (REFUSAL, changed(REFUSED, "details", to={}), "reason: expected 'QUEUE_FULL', got None"),
        (REFUSAL, changed(REFUSED, "details", "reason", to="BUSY"), "expected 'QUEUE_FULL'"),
        (REFUSAL, changed(REFUSED, "details", "domain", to="other"), "expected 'mlxrunner.v1'"),
        (REFUSAL, changed(REFUSED, "details", "metadata", to={}), "queuedCount: expected '1'"),
        (REFUSAL, changed(REFUSED, "details", "violations", to=[]), "options.top_k"),
        (REFUSAL, changed(REFUSED, "details", "retry_seconds", to=0), "expected above 0, got 0"),
        (REFUSAL, changed(REFUSED, "details", "retry_seconds", to=None), "expected above 0"),
        (
            UNLOADED,
            changed(REFUSED, "details", "violations", to=[]),
            "retry_seconds: expected None",
        ),
        (LOAD, changed(LOADED, "statuses", to=[]), "expected statuses, got none"),
        (LOAD, changed(LOADED, "statuses", 0, "progress", to=50), "progress that rises"),
        (LOAD, changed(LOADED, "statuses", 1, "progress", to=0), "no status of 3 was"),
        (LOAD, changed(LOADED, "statuses", 2, "progress", to=99), "expected 100, got 99"),
        (LOAD, changed(LOADED, "messages", 0, "model", to={}), "at least 1, got '0'"),
        (LOAD, changed(LOADED, "messages", to=[]), "last message: expected"),
    ],
)
def test_a_wrong_answer_is_found(wanted: Json, answer: Json, complaint: str) -> None:
    found = "; ".join(problems(wanted, [answer]))
    assert found.startswith("step 0, call ")
    assert complaint in found


def test_probabilities_above_one_are_found() -> None:
    wanted = scenario([call("Completion")], {"logprobs": 2})
    first = {"token_id": 5, "text": "a", "bytes": "YQ==", "logprob": -0.5}
    token: Json = first | {"top": [first, first | {"token_id": 6}]}
    answer = {"code": "OK", "messages": [message("a", 5, done=True, evalCount=1, logprobs=[token])]}
    assert "logarithms of probabilities" in problems(wanted, [answer]).pop()
    token["top"][1]["logprob"] = -1.0
    assert problems(wanted, [answer]) == []


def test_completions_of_a_scenario_are_compared_with_each_other() -> None:
    steps = [call("Completion"), call("Completion")]
    same = scenario(steps, {"logprobs": 1}, {"logprobs": 1, "same_as": 0})
    other = scenario(steps, {"logprobs": 1}, {"logprobs": 1, "differs_from": 0})
    another = changed(COMPLETED, "messages", 0, to=message("the ", 5))
    assert problems(same, [COMPLETED, COMPLETED]) == []
    assert (
        "expected the same text as 'a fox', got 'the fox'"
        in problems(same, [COMPLETED, another]).pop()
    )
    assert problems(other, [COMPLETED, another]) == []
    assert "expected another text" in problems(other, [COMPLETED, COMPLETED]).pop()


def test_an_awaited_status_must_arrive() -> None:
    wanted = scenario([{"op": "until_status", "fields": {"queued_count": 1}}], {})
    come, not_come = ({"code": "OK", "messages": [{"queuedCount": each}]} for each in (1, 0))
    assert problems(wanted, [come]) == []
    assert problems(wanted, [not_come]) == [
        "step 0, until_status: status: queued_count: expected 1, got 0"
    ]
    assert "got None" in problems(wanted, [{"code": "OK", "messages": []}]).pop()


def test_a_finish_step_is_judged_by_the_call_it_finishes() -> None:
    steps = [{"op": "start", "as": "a", "rpc": "Status"}, {"op": "finish", "of": "a"}]
    wanted = scenario(steps, {}, {"last": {"state": "STATE_IDLE"}})
    assert problems(wanted, [{}, {"code": "OK", "messages": [{"state": "STATE_IDLE"}]}]) == []
    found = problems(wanted, [{}, {"code": "OK", "messages": [{"content": "a"}]}])
    assert "step 1, finish a: a message is not a StatusResponse" in found.pop()


def test_missing_pings_are_found() -> None:
    wanted = scenario([call("Status")], {"pings": {"at_least": 5}})
    answer = {"code": "OK", "messages": [{}]}
    assert problems(wanted, [answer], pings=5) == []
    assert (
        "pings out of silence: expected at least 5, got 4"
        in problems(wanted, [answer], pings=4).pop()
    )


def test_every_step_must_have_a_result() -> None:
    assert problems(COMPLETION, None) == ["it printed no line for this scenario"]
    assert problems(COMPLETION, []) == ["expected 1 results, one a step; got 0"]
    assert "not a result" in problems(COMPLETION, ["text"]).pop()  # type: ignore[list-item]  # a wrong one


def test_disagreements_between_languages_are_found() -> None:
    another = changed(COMPLETED, "messages", 0, "content", to="the ")
    assert disagreements(COMPLETION, {"go": [COMPLETED], "rust": [COMPLETED]}) == []
    assert disagreements(COMPLETION, {"go": [COMPLETED], "rust": [another], "node": [another]}) == [
        "step 0: not the same in all languages: go: 'a fox'; rust, node: 'the fox'"
    ]


def test_output_lines_are_parsed() -> None:
    line = '{"scenario": "a", "results": [{}]}'
    assert read_output(f"{line}\n") == {"a": [{}]}
    with pytest.raises(ValueError, match="two lines for 'a'"):
        read_output(f"{line}\n{line}")
    for wrong in ("hello", "[]", '{"scenario": "a"}'):
        with pytest.raises(ValueError, match="a line that is not a result"):
            read_output(wrong)


def test_scenarios_expect_only_known_keys() -> None:
    names = [each["name"] for each in SCENARIOS]
    assert len(set(names)) == len(names)
    for each in SCENARIOS:
        assert len(each["expect"]) == len(each["steps"])
        assert {key for expected in each["expect"] for key in expected} <= KEYS


def frame(kind: int, flags: int = 0, payload: bytes = b"8 bytes.") -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + bytes(4) + payload


def test_only_pings_after_silence_are_counted() -> None:
    ping, acknowledgement, data = frame(6), frame(6, 1), frame(0, payload=b"x" * 300)
    pings = Pings()
    now = 100.0
    pings.feed(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + data + ping, now)
    pings.feed(acknowledgement, now + SILENCE_SECONDS)
    assert pings.count == 0
    now += 10 * SILENCE_SECONDS
    pings.feed(ping, now)
    assert pings.count == 1
    for byte in data + ping:
        pings.feed(bytes([byte]), now + SILENCE_SECONDS)
    assert pings.count == 1
    for byte in ping:
        pings.feed(bytes([byte]), now + 2 * SILENCE_SECONDS)
    assert pings.count == 2
