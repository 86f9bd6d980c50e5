"""Detection of request fields unknown to this server's protocol.

Protobuf silently keeps unknown fields, so a server would ignore options set by a newer client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice
from typing import TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

_M = TypeVar("_M", bound=Message)

Violations = list[tuple[str, str]]

WHOLE = "request"
"""Field path in errors about the request as a whole."""

_MAX_NAMED = 8
_MAX_LISTED_BYTES = 256 << 10
"""Largest request whose unknown fields are listed without measuring them first. Protobuf lists all
of them at once: 22 million, in the largest message accepted, take 12 s and 2 GiB."""


def read_known(read: Callable[[bytes], _M], data: bytes) -> tuple[_M, Violations]:
    """Parse a request and find unknown fields.

    Args:
        read: Parses a request.
        data: The serialized request.

    Returns:
        The request, and pairs of a message's path and a description of an unknown field in it.

    Raises:
        Exception: Any exception of ``read``.
    """
    request = read(data)
    if len(data) <= _MAX_LISTED_BYTES:
        return request, _named(request)
    size = request.ByteSize()
    request.DiscardUnknownFields()
    unknown = size - request.ByteSize()
    if not unknown:
        return request, []
    if unknown <= _MAX_LISTED_BYTES:
        return request, _named(read(data))
    text = f"{unknown} of its bytes are in fields unknown to mlx-grpc-runner {_version()}"
    return request, [(WHOLE, f"{text}; leave them out")]


def _named(request: Message) -> Violations:
    return list(islice(_unknown(request, ""), _MAX_NAMED))


def _unknown(message: Message, path: str) -> Iterator[tuple[str, str]]:
    # The C and the Python implementations of protobuf have the same interface here.
    descriptor = cast("Descriptor", message.DESCRIPTOR)
    found = UnknownFieldSet(message)
    # A request may repeat an unknown field; name each once.
    for number in dict.fromkeys(found[i].field_number for i in range(len(found))):
        yield path or WHOLE, _problem(descriptor, number)
    for field in _message_fields(descriptor):
        inside = f"{path}.{field.name}" if path else field.name
        for part in _parts(message, field):
            yield from _unknown(part, inside)


def _problem(descriptor: Descriptor, number: int) -> str:
    field = f"field {number} of {descriptor.name}"
    known = descriptor.fields_by_number.get(number)
    if known:
        return f"{field} ({known.name}) has another wire type than in mlx-grpc-runner {_version()}"
    return (
        f"{field} is unknown to mlx-grpc-runner {_version()}; a newer client sent it: upgrade "
        "the server or leave it out"
    )


@cache
def _version() -> str:
    # Only for a refusal, because the import delays the ready line.
    from importlib import metadata  # noqa: PLC0415 - slow

    return metadata.version("mlx-grpc-runner")


@cache
def _message_fields(descriptor: Descriptor) -> tuple[FieldDescriptor, ...]:
    """Return the message-typed fields, without maps.

    A map entry with an unknown field becomes an unknown field of the message itself.
    """
    return tuple(
        field
        for field in descriptor.fields
        if field.message_type and not field.message_type.GetOptions().map_entry
    )


def _parts(message: Message, field: FieldDescriptor) -> Iterable[Message]:
    if field.is_repeated:
        several: Iterable[Message] = getattr(message, field.name)
        return several
    return [getattr(message, field.name)] if message.HasField(field.name) else []
