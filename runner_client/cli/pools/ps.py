"""``mlx-runner ps``: the models of a pool."""

from __future__ import annotations

import sys
from functools import cached_property
from typing import TYPE_CHECKING, Any

import click
import grpc

from mlxrunner.v1 import pool_pb2, pool_pb2_grpc
from runner_client.cli.shared.access import (
    Credentials,
    access_options,
    address_argument,
    opened,
)
from runner_client.cli.shared.errors import EXIT_CODES
from runner_client.cli.shared.options import json_option
from runner_client.cli.shared.output import print_json
from runner_client.rpc.calls import Connection
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Unpack

    from google.protobuf.message import Message

    from runner_client.types import TlsFiles

_COLUMNS = ("MODEL", "STATE", "MEMORY", "IN USE", "WAITING", "IDLE", "PINNED", "NOTE")
_CLEAR = "\x1b[H\x1b[2J"
_MINUTE = 60
_HOUR = 3600


class _PoolConnection(Connection):
    """Connection to a pool."""

    @cached_property
    def _pool(self) -> pool_pb2_grpc.PoolServiceStub:
        return pool_pb2_grpc.PoolServiceStub(self._channel)

    def models(self) -> pool_pb2.ListModelsResponse:
        """Return the pool's state.

        Raises:
            RunnerError: The call failed.
        """
        return self.call(self._pool.ListModels, pool_pb2.ListModelsRequest())

    def watch(self) -> Iterator[pool_pb2.ListModelsResponse]:
        """Yield the pool's state now and after each change.

        Raises:
            RunnerError: The call failed.
        """
        call = self._pool.Watch(pool_pb2.WatchRequest(), metadata=self.access.metadata)
        try:
            for message in call:
                yield message.pool
        except grpc.RpcError as error:
            raise self.translated(error) from error
        finally:
            call.cancel()


def _connect(address: str, *, token: str | None, tls: TlsFiles | None) -> _PoolConnection:
    return _PoolConnection(address, None, token, tls, None)


@click.command("ps", short_help="Show the models of a pool.", epilog=EXIT_CODES)
@address_argument
@access_options
@json_option
@click.option("--watch", is_flag=True, help="Show them again after each change, until interrupted.")
def command(
    address: str, *, as_json: bool, watch: bool, **credentials: Unpack[Credentials]
) -> None:
    """Show the models of the pool at ADDRESS.

    ADDRESS is HOST:PORT, [IPV6]:PORT or unix:/path.
    """
    pool = opened(_connect, address, **credentials)
    try:
        for state in pool.watch() if watch else [pool.models()]:
            if as_json:
                print_json(_plain(state))
                continue
            if watch and sys.stdout.isatty():
                click.echo(_CLEAR, nl=False)
            click.echo(table(state))
    finally:
        pool.close()


def table(state: pool_pb2.ListModelsResponse) -> str:
    """Describe the models of a pool in aligned columns, and the memory of all."""
    rows = [_COLUMNS, *map(_row, state.models)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS) - 1)]
    lines = [
        "  ".join(
            [*(f"{text:<{width}}" for text, width in zip(row, widths, strict=False)), row[-1]]
        )
        for row in rows
    ]
    limit = format_bytes(state.budget_bytes) if state.budget_bytes else "what the machine can give"
    lines.append(f"{format_bytes(state.held_bytes)} of {limit}{_spares(state)}")
    return "\n".join(line.rstrip() for line in lines)


def _spares(state: pool_pb2.ListModelsResponse) -> str:
    if not state.HasField("spare_count"):
        return ""
    return (
        f", {format_bytes(state.spare_bytes)} of it in spare processes ({state.spare_count} ready)"
    )


def _row(model: pool_pb2.PoolModel) -> tuple[str, ...]:
    state = pool_pb2.PoolModelState.Name(model.state).removeprefix("POOL_MODEL_STATE_").lower()
    if model.state == pool_pb2.POOL_MODEL_STATE_LOADING:
        state += f" {model.progress} %"
    idle = _span(model.idle_duration.seconds) if model.HasField("idle_duration") else "-"
    return (
        model.name,
        state,
        format_bytes(model.held_bytes) if model.held_bytes else "-",
        str(model.lease_count),
        str(model.waiting_count),
        idle,
        "yes" if model.pinned else "no",
        model.reason or model.last_error,
    )


def _span(seconds: int) -> str:
    if seconds < _MINUTE:
        return f"{seconds} s"
    return f"{seconds // _MINUTE} min" if seconds < _HOUR else f"{seconds // _HOUR} h"


def _plain(message: Message) -> dict[str, Any]:
    """Return the fields of a message, for JSON, with 64-bit numbers as numbers."""
    plain: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.name == "idle_duration":
            seconds = value.ToNanoseconds() / 1e9
            plain["idle_seconds"] = seconds if message.HasField(field.name) else None
        elif field.enum_type:
            name = field.enum_type.values_by_number[value].name
            plain[field.name] = name.removeprefix("POOL_MODEL_STATE_").lower()
        elif field.message_type:
            plain[field.name] = list(map(_plain, value)) if field.is_repeated else _plain(value)
        elif field.name.startswith("spare_") and not message.HasField(field.name):
            plain[field.name] = None
        else:
            plain[field.name] = value
    return plain
