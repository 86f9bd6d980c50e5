"""Any value in any field of any request: answers from the error table, no harm to neighbours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from hypothesis import HealthCheck, Phase, event, given, seed, settings
from hypothesis import strategies as st

from mlxrunner.v1 import runner_pb2 as pb
from support.call_outcomes import CODES, Caller
from support.harness import Server, StartServer, joined
from support.hostile_requests import METHODS, Call, calls

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


def _field_paths() -> list[tuple[str, FieldPath]]:
    """Return each request field as the path of fields leading there; a map is one field."""
    found: list[tuple[str, FieldPath]] = []
    waiting: list[tuple[str, FieldPath]] = [
        (method.name, (field,)) for method in METHODS for field in method.input_type.fields
    ]
    while waiting:
        name, path = waiting.pop()
        found.append((name, path))
        inside = path[-1].message_type
        if inside and not inside.GetOptions().map_entry:
            waiting += [(name, (*path, field)) for field in inside.fields]
    return found


def _is_set(part: Message, path: FieldPath) -> bool:
    first, *rest = path
    if first not in [field for field, _ in part.ListFields()]:
        return False
    value = getattr(part, first.name)
    inside = [value] if isinstance(value, Message) else value
    return not rest or any(_is_set(item, tuple(rest)) for item in inside)


def test_the_generator_sets_every_field() -> None:
    """Check the generator itself: a property proves nothing about a field left unset.

    A seed does not fix the values: Hypothesis also draws constants from the modules that happen
    to be imported. One round in several misses a field; 60 together miss none.
    """
    missing = set(_field_paths())
    for number in range(_ROUNDS):
        if missing:
            _remove_set_fields(number, missing)
    assert not [".".join([name, *(field.name for field in path)]) for name, path in missing]


def _remove_set_fields(number: int, missing: set[tuple[str, FieldPath]]) -> None:
    """Generate calls from a seed and remove the fields set by the calls from ``missing``."""
    classes = {method.name: GetMessageClass(method.input_type) for method in METHODS}

    @seed(number)
    @settings(hostile, max_examples=1000, database=None, phases=[Phase.generate])
    # Calls whose fields were all set already would only take time.
    @given(call=calls({name for name, _ in missing}.__contains__))
    def look(call: Call) -> None:
        name, data = call
        try:
            request = classes[name].FromString(data)
        except DecodeError:
            return
        missing.difference_update(
            [(of, path) for of, path in missing if of == name and _is_set(request, path)]
        )

    look()


def test_the_table_has_every_reason() -> None:
    reasons = {
        name.removeprefix("ERROR_REASON_") for name in pb.ErrorReason.DESCRIPTOR.values_by_name
    }
    assert CODES.keys() == reasons - {"UNSPECIFIED"}
