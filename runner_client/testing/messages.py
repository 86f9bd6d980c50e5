"""Messages of a fake runner."""

from __future__ import annotations

from mlxrunner.v1 import runner_pb2 as pb


def text_of(message: pb.ChatMessage) -> str:
    """Return the text of a message, or the joined texts of its parts."""
    return message.content or "".join(part.text for part in message.content_parts)


def as_chat(part: pb.CompletionResponse) -> pb.ChatResponse:
    """Return the message of an answer with the fields of a message of a completion."""
    names = pb.ChatResponse.DESCRIPTOR.fields_by_name
    fields = {field.name: value for field, value in part.ListFields()}
    return pb.ChatResponse(**{name: fields[name] for name in names if name in fields})


def as_completion(request: pb.CompletionRequest | pb.ChatRequest) -> pb.CompletionRequest:
    """Return the request for a completion with the same options."""
    if isinstance(request, pb.CompletionRequest):
        return request
    logprobs = request.logprobs if request.HasField("logprobs") else None
    return pb.CompletionRequest(options=request.options, logprobs=logprobs)
