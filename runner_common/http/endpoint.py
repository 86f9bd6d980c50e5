"""Routes with tokens, bodies, errors and disconnected clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from starlette.routing import Route

from runner_common.http.body import DisconnectedError, TooLargeError
from runner_common.http.exchange import Exchange
from runner_common.http.host import StatusError
from runner_common.http.problems import Problem, problem_of
from runner_common.serving.interceptor import UnreadableRequestError
from runner_common.serving.unknown_fields import WHOLE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import Receive, Scope, Send

    from runner_common.http.body import JsonObject
    from runner_common.http.guard import Guard
    from runner_common.http.host import Host

    Handler = Callable[[Host, Exchange, JsonObject], Awaitable[None]]


class Dialect(Protocol):
    """The form of errors in one of the interfaces."""

    def error(self, problem: Problem) -> dict[str, Any]:
        """Return the JSON object for a problem."""
        ...

    def late_error(self, problem: Problem) -> bytes:
        """Return the last part of a failed stream."""
        ...


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One route of an interface.

    Attributes:
        verb: HTTP method, ``GET`` or another one, whose body must then be a JSON object.
        path: Path, with parameters as in starlette.
        rpc: Name of the rpc that a request counts as.
        handle: Answers a request, given its JSON object (an empty one for ``GET``). Errors are
            exceptions: :class:`StatusError` by the host, ``UnreadableRequestError`` for fields.
        is_use: Whether the token for use suffices.
        is_open: Whether no token is needed.
        takes_any_type: Whether programs other than browsers may send another content type than
            that of JSON.
    """

    verb: str
    path: str
    rpc: str
    handle: Handler
    is_use: bool = True
    is_open: bool = False
    takes_any_type: bool = False

    def route(self, host: Host, guard: Guard, dialect: Dialect) -> Route:
        """Return the route for a host.

        Args:
            host: The runner or pool that answers.
            guard: Decides who may call.
            dialect: The form of errors.
        """
        return Route(self.path, _App(self, host, guard, dialect))


class _App:
    """ASGI application of an endpoint."""

    def __init__(self, endpoint: Endpoint, host: Host, guard: Guard, dialect: Dialect) -> None:
        self._endpoint = endpoint
        self._host = host
        self._guard = guard
        self._dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(self._endpoint.path, scope, receive, send)
        try:
            await self._answer(exchange)
        except DisconnectedError:
            return
        except StatusError as error:
            await self._fail(exchange, problem_of(error.status, is_ready=self._is_ready()))
        except RecursionError:
            deep = UnreadableRequestError([(WHOLE, "the body is nested too deeply")])
            await self._refuse(exchange, deep)
        except Exception as error:  # noqa: BLE001 - the last line before the wire
            await self._refuse(exchange, error)

    async def _refuse(self, exchange: Exchange, error: Exception) -> None:
        status = self._host.refused(error, self._endpoint.rpc, exchange.call)
        problem = problem_of(status, is_ready=self._is_ready())
        await self._fail(exchange, problem, 413 if isinstance(error, TooLargeError) else None)

    def _is_ready(self) -> bool:
        return self._host.problem() is None

    async def _answer(self, exchange: Exchange) -> None:
        endpoint = self._endpoint
        # The server drops the body of an answer to HEAD.
        if exchange.verb not in (("GET", "HEAD") if endpoint.verb == "GET" else (endpoint.verb,)):
            text = f"{exchange.verb[:20]}: only {endpoint.verb} is answered here"
            problem = Problem(405, "method_not_allowed", text)
            await exchange.send_json(self._dialect.error(problem), 405, {"allow": endpoint.verb})
            return
        if not endpoint.is_open:
            self._guard.check(exchange, is_use=endpoint.is_use)
        exchange.has_all_rights = self._guard.has_all_rights(exchange)
        body = await self._body(exchange)
        async with exchange.until_disconnect():
            await endpoint.handle(self._host, exchange, body)

    async def _body(self, exchange: Exchange) -> JsonObject:
        if self._endpoint.verb == "GET":
            return {}
        return await exchange.read_json(takes_any_type=self._endpoint.takes_any_type)

    async def _fail(self, exchange: Exchange, problem: Problem, status: int | None = None) -> None:
        if exchange.has_begun:
            await exchange.end_stream(self._dialect.late_error(problem))
            return
        await exchange.send_json(
            self._dialect.error(problem), status or problem.status, problem.headers()
        )
