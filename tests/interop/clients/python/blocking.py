"""A client on grpcio's blocking API."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc

from interop.clients.python import shared
from interop.clients.python.shared import Json
from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc


class Call:
    """A call in progress."""

    def __init__(self, session: Session, step: Json) -> None:
        method: Any = getattr(session.stub, step["rpc"])
        self._messages: list[Any] = []
        is_stream = isinstance(method, grpc.UnaryStreamMultiCallable)
        self.handle = (method if is_stream else method.future)(
            shared.request_of(step),
            metadata=session.metadata,
            timeout=step.get("timeout_seconds", shared.CALL_SECONDS),
        )
        self._answers = self.handle if is_stream else self._read()

    def _read(self) -> Iterator[Any]:
        yield self.handle.result()

    def read_until(self, count: int) -> None:
        """Read until ``count`` messages have arrived."""
        while len(self._messages) < count:
            self._messages.append(next(self._answers))

    def finish(self) -> Json:
        """Read the call to the end."""
        try:
            self._messages.extend(self._answers)
        except grpc.RpcError as error:
            return shared.failure(error, self._messages)
        return shared.success(self._messages)


class Session:
    """One scenario on a separate channel."""

    def __init__(self, channel: grpc.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        self.stub = runner_pb2_grpc.RunnerServiceStub(channel)
        self.metadata = metadata
        self._calls: dict[str, Call] = {}

    def run(self, step: Json) -> Json:
        """Perform a step."""
        try:
            result: Json = getattr(self, f"_{step['op']}")(step)
        except Exception as error:  # noqa: BLE001 - reported to the judge
            return shared.broken(error)
        return result

    def _call(self, step: Json) -> Json:
        call = Call(self, step)
        if not step.get("watch_status"):
            return call.finish()
        answered = threading.Event()
        call.handle.add_done_callback(lambda _: answered.set())
        statuses = [self._status()]
        while not answered.wait(shared.STATUS_SECONDS):
            statuses.append(self._status())
        statuses.append(self._status())
        return call.finish() | {"statuses": shared.plain(statuses)}

    def _start(self, step: Json) -> Json:
        call = self._calls[step["as"]] = Call(self, step)
        call.read_until(step.get("until_messages", 0))
        return {}

    def _cancel(self, step: Json) -> Json:
        call = self._calls[step["of"]]
        call.handle.cancel()
        return call.finish()

    def _finish(self, step: Json) -> Json:
        return self._calls[step["of"]].finish()

    def _until_status(self, step: Json) -> Json:
        end = time.monotonic() + shared.UNTIL_STATUS_SECONDS
        while not shared.has_fields(status := self._status(), step["fields"]):
            if time.monotonic() > end:
                break
            time.sleep(shared.STATUS_SECONDS)
        return shared.success([status])

    def _status(self) -> pb.StatusResponse:
        return self.stub.Status(
            pb.StatusRequest(), metadata=self.metadata, timeout=shared.CALL_SECONDS
        )


def main() -> None:
    """Run the scenarios."""
    scenarios, servers = shared.arguments()
    for scenario in scenarios:
        server = servers[scenario["server"]]
        options = shared.channel_options(scenario)
        with grpc.insecure_channel(server["address"], options) as channel:
            session = Session(channel, shared.metadata_of(scenario, server))
            shared.print_results(scenario, [session.run(step) for step in scenario["steps"]])


if __name__ == "__main__":
    main()
