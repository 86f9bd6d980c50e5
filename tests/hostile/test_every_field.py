"""Any value in any field of any request: answers from the error table, no harm to neighbours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from hypothesis import HealthCheck, Phase, event, given, seed, settings
from hypothesis import strategies as st

from mlxrunner.v1 import runner_pb2 as pb
from support.call_outcomes import CODES, Caller
from support.harness import Server, StartServer, joined
from support.hostile_requests import METHODS, Call, calls, messages

CONTEXT_LENGTH = 512
LIFECYCLE = {"Load", "Unload", "Drain"}
"""Rpcs that end running streams by design, or refuse new ones."""

_ROUNDS = 60

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

hostile = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
async def target(start_server: StartServer) -> AsyncIterator[Server]:
    """A server with a model, checked to be idle and healthy after the test."""
    server = await start_server()
    await server.load(context_length=CONTEXT_LENGTH)
    yield server
    await server.settled()
    await server.assert_nothing_left()
    status = await server.status()
    assert (status.running_count, status.queued_count) == (0, 0)
    assert not status.last_error
    assert await server.health() == health_pb2.HealthCheckResponse.SERVING


@asynccontextmanager
async def neighbour(server: Server) -> AsyncIterator[None]:
    """Run a seeded stream meanwhile and compare its text with the one decoded alone."""
    options: dict[str, Any] = {"seed": 7, "num_predict": 100}
    alone = await server.text("neighbour", **options)
    call = server.start("neighbour", **options)
    messages = [await anext(aiter(call))]
    yield
    messages += [message async for message in call]
    assert joined(messages) == alone


@hostile
@given(batch=st.lists(calls(lambda name: name not in LIFECYCLE), min_size=1, max_size=6))
async def test_any_request_is_answered_from_the_error_table_beside_a_neighbour(
    target: Server, batch: list[Call]
) -> None:
    caller = Caller(target.channel)
    async with neighbour(target):
        await asyncio.gather(*(caller.send(call) for call in batch))
    _report_endings(caller)
    assert (await target.status()).state == pb.STATE_ACTIVE


@hostile
@given(batch=st.lists(calls(lambda name: name in LIFECYCLE), min_size=1, max_size=4))
async def test_loads_and_unloads_are_answered_from_the_error_table(
    target: Server, batch: list[Call]
) -> None:
    caller = Caller(target.channel)
    await asyncio.gather(*(caller.send(call) for call in batch))
    _report_endings(caller)
    # Whatever the calls did, the process can load again.
    await target.load(context_length=CONTEXT_LENGTH)
    assert (await target.status()).state == pb.STATE_ACTIVE


def _report_endings(caller: Caller) -> None:
    """Report the outcomes to ``--hypothesis-show-statistics``."""
    for ending in caller.endings:
        event(ending)


FieldPath = tuple[FieldDescriptor, ...]
Part = tuple[Descriptor, st.SearchStrategy[bytes], list[FieldPath]]
"""A message, what generates it, and the fields to look for."""


def _parts() -> list[Part]:
    """Return every request, and apart from them the messages in their fields.

    A call sets few fields, so that thousands of calls are needed for a field at depth three.
    ``messages`` generates the content of a request's field, and is looked at alone.
    """
    parts: list[Part] = []
    inside: dict[str, Descriptor] = {}
    for method in METHODS:
        generated = calls(method.name.__eq__).map(lambda call: call[1])
        fields = list(method.input_type.fields)
        parts.append((method.input_type, generated, [(field,) for field in fields]))
        inside |= {each.full_name: each for field in fields if (each := _message_in(field))}
    parts += [(each, messages(each, 1), _paths(each)) for each in inside.values()]
    return parts


def _paths(descriptor: Descriptor) -> list[FieldPath]:
    """Return each field at any depth as the path of fields leading there; a map is one field."""
    found: list[FieldPath] = []
    waiting: list[FieldPath] = [(field,) for field in descriptor.fields]
    while waiting:
        path = waiting.pop()
        found.append(path)
        if inside := _message_in(path[-1]):
            waiting += [(*path, field) for field in inside.fields]
    return found


def _message_in(field: FieldDescriptor) -> Descriptor | None:
    inside: Descriptor | None = field.message_type
    return inside if inside and not inside.GetOptions().map_entry else None


def _is_set(part: Message, path: FieldPath) -> bool:
    """Return whether a field is set; a message with fields counts once any of these is set."""
    first, *rest = path
    if first not in [field for field, _ in part.ListFields()]:
        return False
    if not (inside := _message_in(first)) or not inside.fields:
        return True
    value = getattr(part, first.name)
    items = [value] if isinstance(value, Message) else value
    if not rest:
        return any(item.ByteSize() for item in items)
    return any(_is_set(item, tuple(rest)) for item in items)


@pytest.mark.exhaustive
def test_the_generator_sets_every_field() -> None:
    """Check the generator itself: a property proves nothing about a field left unset.

    A seed does not fix the values: Hypothesis also draws constants from the modules that happen
    to be imported. The rarest field takes about 5 rounds.
    """
    missing = {part[0].full_name: _missing(*part) for part in _parts()}
    assert {name: paths for name, paths in missing.items() if paths} == {}


def _missing(
    descriptor: Descriptor, generated: st.SearchStrategy[bytes], paths: list[FieldPath]
) -> list[str]:
    """Return the fields that no generated message sets."""
    missing = set(paths)
    for number in range(_ROUNDS):
        if missing:
            _remove_set_fields(number, GetMessageClass(descriptor), generated, missing)
    return sorted(".".join(field.name for field in path) for path in missing)


def _remove_set_fields(
    number: int,
    message: type[Message],
    generated: st.SearchStrategy[bytes],
    missing: set[FieldPath],
) -> None:
    """Generate messages from a seed and remove the fields set by these from ``missing``."""

    @seed(number)
    @settings(hostile, max_examples=100, database=None, phases=[Phase.generate])
    @given(data=generated)
    def look(data: bytes) -> None:
        if not missing:
            return
        try:
            part = message.FromString(data)
        except DecodeError:
            return
        missing.difference_update([path for path in missing if _is_set(part, path)])

    look()


def test_the_table_has_every_reason() -> None:
    reasons = {
        name.removeprefix("ERROR_REASON_") for name in pb.ErrorReason.DESCRIPTOR.values_by_name
    }
    assert CODES.keys() == reasons - {"UNSPECIFIED"}
