"""Any value in any field of any request: an answer of the table, and nobody else notices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

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
LIFECYCLE = {"Load", "Unload"}
"""These end running streams by design."""

_ROUNDS = 20

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

hostile = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
async def target(start_server: StartServer) -> AsyncIterator[Server]:
    """A server with a model; whatever a test did, it is idle and healthy afterwards."""
    server = await start_server()
    await server.load(context_length=CONTEXT_LENGTH)
    yield server
    await server.settled()
    server.assert_nothing_left()
    status = await server.status()
    assert (status.running_count, status.queued_count) == (0, 0)
    assert not status.last_error
    assert await server.health() == health_pb2.HealthCheckResponse.SERVING


@asynccontextmanager
async def neighbour(server: Server) -> AsyncIterator[None]:
    """A seeded stream that runs meanwhile and must be what it is alone."""
    options = {"seed": 7, "num_predict": 100}
    alone = await server.text("neighbour", **options)
    call = server.start("neighbour", **options)
    messages = [await anext(aiter(call))]
    yield
    messages += [message async for message in call]
    assert joined(messages) == alone


@hostile
@given(batch=st.lists(calls(lambda name: name not in LIFECYCLE), min_size=1, max_size=6))
async def test_an_answer_of_the_table_and_no_harm_to_a_neighbour(
    target: Server, batch: list[Call]
) -> None:
    caller = Caller(target.channel)
    async with neighbour(target):
        await asyncio.gather(*(caller.send(call) for call in batch))
    _tell(caller)
    assert (await target.status()).state == pb.STATE_ACTIVE


@hostile
@given(batch=st.lists(calls(lambda name: name in LIFECYCLE), min_size=1, max_size=4))
async def test_loads_and_unloads_end_from_the_table_too(target: Server, batch: list[Call]) -> None:
    caller = Caller(target.channel)
    await asyncio.gather(*(caller.send(call) for call in batch))
    _tell(caller)
    # Whatever came of it, the process can load again.
    await target.load(context_length=CONTEXT_LENGTH)
    assert (await target.status()).state == pb.STATE_ACTIVE


def _tell(caller: Caller) -> None:
    """Counts for ``--hypothesis-show-statistics``."""
    for ending in caller.endings:
        event(ending)


Way = tuple[FieldDescriptor, ...]


def _ways() -> list[tuple[str, Way]]:
    """Every field of every request, by the fields that lead to it; maps count as one field."""
    found: list[tuple[str, Way]] = []
    waiting: list[tuple[str, Way]] = [
        (method.name, (field,)) for method in METHODS for field in method.input_type.fields
    ]
    while waiting:
        name, way = waiting.pop()
        found.append((name, way))
        inside = way[-1].message_type
        if inside and not inside.GetOptions().map_entry:
            waiting += [(name, (*way, field)) for field in inside.fields]
    return found


def _is_set(part: Message, way: Way) -> bool:
    first, *rest = way
    if first not in [field for field, _ in part.ListFields()]:
        return False
    return not rest or _is_set(getattr(part, first.name), tuple(rest))


def test_every_field_is_reached() -> None:
    """A property that never sets a field says nothing about it.

    A seed does not fix what is drawn: Hypothesis draws constants of the modules too that
    happen to be imported. One round in several misses a field, and never all of them do.
    """
    missing = set(_ways())
    for number in range(_ROUNDS):
        if missing:
            _look(number, missing)
    assert not [".".join([name, *(field.name for field in way)]) for name, way in missing]


def _look(number: int, missing: set[tuple[str, Way]]) -> None:
    """Makes calls from a seed, and removes the fields that they set."""
    classes = {method.name: GetMessageClass(method.input_type) for method in METHODS}

    @seed(number)
    @settings(hostile, max_examples=1000, database=None, phases=[Phase.generate])
    @given(call=calls(lambda _name: True))
    def look(call: Call) -> None:
        name, data = call
        try:
            request = classes[name].FromString(data)
        except DecodeError:
            return
        missing.difference_update(
            [(of, way) for of, way in missing if of == name and _is_set(request, way)]
        )

    look()


def test_the_table_is_whole() -> None:
    reasons = {
        name.removeprefix("ERROR_REASON_") for name in pb.ErrorReason.DESCRIPTOR.values_by_name
    }
    assert CODES.keys() == reasons - {"UNSPECIFIED"}
