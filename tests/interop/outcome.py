"""The outcome of a step, as reported by a client, with typed messages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from mlxrunner.v1 import runner_pb2 as pb

Json = dict[str, Any]

_ANSWERS: dict[str, type[Message]] = {
    "Load": pb.LoadResponse,
    "Unload": pb.UnloadResponse,
    "Status": pb.StatusResponse,
    "Completion": pb.CompletionResponse,
    "Chat": pb.ChatResponse,
    "Embed": pb.EmbedResponse,
    "RenderChat": pb.RenderChatResponse,
    "Tokenize": pb.TokenizeResponse,
    "Detokenize": pb.DetokenizeResponse,
}


@dataclass
class Outcome:
    """The typed outcome of a step.

    Attributes:
        step: The step of the scenario.
        call: The step that made the call, which may be an earlier one.
        code: The status code; None for a step without one.
        message: The status message.
        details: The details of a failure.
        messages: Plain data with the protocol's field names, including default values.
        statuses: The same for the statuses of a step with ``watch_status``.
    """

    step: Json
    call: Json
    code: str | None
    message: str
    details: Json
    messages: list[Json] = field(default_factory=list)
    statuses: list[Json] = field(default_factory=list)

    @property
    def last(self) -> Json | None:
        """The last message; None if there was none."""
        return self.messages[-1] if self.messages else None

    @property
    def text(self) -> str:
        """The joined content of the messages."""
        return "".join(message.get("content", "") for message in self.messages)

    @property
    def token_ids(self) -> list[int]:
        """The token ids of every message, in order."""
        return self.joined("token_ids")

    @property
    def is_completion(self) -> bool:
        """Whether the call is a completion, perhaps of a conversation."""
        return self.is_answer or bool(self.call.get("rpc") == "Completion")

    @property
    def is_answer(self) -> bool:
        """Whether the call answers a conversation."""
        return bool(self.call.get("rpc") == "Chat")

    def joined(self, field: str) -> list[Any]:
        """Return the entries of a repeated field in every message, in order."""
        return [each for message in self.messages for each in message.get(field, ())]


def outcome_of(scenario: Json, step: Json, result: Json) -> Outcome:
    """Convert a result of a client to an outcome with typed messages.

    Raises:
        ValueError: The result breaks the contract.
    """
    if not isinstance(result, dict) or not isinstance(result.get("details", {}), dict):
        raise ValueError(f"not a result of the contract: {result!r}")  # noqa: TRY004 - one kind of error for every breach
    if "broken" in result:
        raise ValueError(f"the client could not do it: {result['broken']}")
    call = step
    if "of" in step:
        call = next(each for each in scenario["steps"] if each.get("as") == step["of"])
    rpc = "Status" if step["op"] == "until_status" else call["rpc"]
    return Outcome(
        step,
        call,
        result.get("code"),
        result.get("message", ""),
        result.get("details", {}),
        [_typed(rpc, each) for each in result.get("messages", ())],
        [_typed("Status", each) for each in result.get("statuses", ())],
    )


def _typed(rpc: str, message: Json) -> Json:
    answer = _ANSWERS[rpc]()
    try:
        json_format.ParseDict(message, answer)
    except (json_format.ParseError, TypeError, AttributeError) as error:
        raise ValueError(f"a message is not a {answer.DESCRIPTOR.name}: {error}") from error
    return json_format.MessageToDict(
        answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
