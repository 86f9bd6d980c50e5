"""Authentication by token, and the check for loopback addresses, which need none."""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health

from runner_common.contract import TOKEN_VARIABLE
from runner_server.errors import Unauthenticated
from runner_server.transport.interceptor import abort

if TYPE_CHECKING:
    # Every service's calls pass through here, so the message types are open.
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Context = grpc.aio.ServicerContext[Any, Any]

_HEADER = "authorization"
_SCHEME = "bearer "

_MIN_TOKEN_CHARS = 16
"""Shortest token that cannot be guessed."""

_TOKEN = re.compile(rf"[!-~]{{{_MIN_TOKEN_CHARS},}}")


def read_token(file: Path | None, environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Return the token that callers must send, from a file or else from the environment.

    Removes the variable in either case, so that child processes do not inherit the token.

    Raises:
        ValueError: The configured token is missing or unusable. The message never contains
            the token.
        OSError: The file cannot be read.
    """
    given = environment.pop(TOKEN_VARIABLE, None)
    if file is not None:
        return _checked(file.read_bytes().decode(errors="replace").strip(), str(file))
    return None if given is None else _checked(given.strip(), TOKEN_VARIABLE)


def _checked(token: str, where: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise ValueError(
            f"the token in {where} has {len(token)} characters: it must have {_MIN_TOKEN_CHARS} "
            "or more, only visible ASCII without spaces; `openssl rand -hex 32` prints a good one"
        )
    return token


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without the token before their request is read; health checks are exempt.

    Args:
        token: Token required of callers as ``authorization: Bearer TOKEN``.
    """

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._no_token = _refusal("none")
        self._other_token = _refusal("a different one")

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Pass an authenticated call on; answer any other with UNAUTHENTICATED."""
        # Health probes usually have no token.
        if handler_call_details.method.startswith(f"/{health.SERVICE_NAME}/"):
            return await continuation(handler_call_details)
        sent = _bearer(handler_call_details)
        if sent is None:
            return self._no_token
        # In constant time, because the duration must not reveal how much of the token is right.
        if not hmac.compare_digest(sent, self._token):
            return self._other_token
        return await continuation(handler_call_details)


def _bearer(details: grpc.HandlerCallDetails) -> bytes | None:
    """Return the token of a call; None if absent or ambiguous."""
    found = [
        value if isinstance(value, bytes) else value.encode(errors="replace")
        for key, value in details.invocation_metadata or ()
        if key == _HEADER
    ]
    if len(found) != 1 or found[0][: len(_SCHEME)].lower() != _SCHEME.encode():
        return None
    return found[0][len(_SCHEME) :].strip()


def _refusal(has: str) -> _Handler:
    fault = Unauthenticated(has)

    async def refuse(_requests: object, context: _Context) -> None:
        await abort(context, fault)

    # A stream-stream handler serves methods of any kind, and this one reads no request.
    return grpc.stream_stream_rpc_method_handler(refuse)


def is_loopback(host: str) -> bool:
    """Return whether a host name or address resolves to loopback addresses only.

    Raises:
        OSError: The host is unknown.
    """
    found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    return all(_is_loopback_address(str(entry[4][0])) for entry in found)


def _is_loopback_address(text: str) -> bool:
    address = ipaddress.ip_address(text)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
