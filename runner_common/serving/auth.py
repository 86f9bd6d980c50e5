"""Authentication by token, and the check for loopback addresses, which need none."""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health

from runner_common.contract import (
    POOL_SERVICE_NAME,
    SERVICE_NAME,
    TOKEN_VARIABLE,
    USE_TOKEN_VARIABLE,
)
from runner_common.serving.statuses import abort

if TYPE_CHECKING:
    from google.rpc import status_pb2

    # Every service's calls pass through here, so the message types are open.
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Context = grpc.aio.ServicerContext[Any, Any]

_HEADER = "authorization"
_SCHEME = "bearer "

_MIN_TOKEN_CHARS = 16
"""Shortest token that cannot be guessed."""

USE_METHODS = frozenset(
    {"Chat", "Completion", "Detokenize", "Embed", "RenderChat", "Status", "Tokenize", "WatchStatus"}
)
"""Methods of a runner open to the token for use."""

_USE_PATHS = frozenset(
    (
        *(f"/{SERVICE_NAME}/{name}" for name in USE_METHODS),
        f"/{POOL_SERVICE_NAME}/ListModels",
        f"/{POOL_SERVICE_NAME}/Watch",
    )
)
"""Methods open to the token for use. Every other one, of any service, is control."""

_REFLECTION = "/grpc.reflection."

_TOKEN = re.compile(rf"[!-~]{{{_MIN_TOKEN_CHARS},}}")


def read_tokens(
    file: Path | None,
    use_file: Path | None,
    environment: MutableMapping[str, str] = os.environ,
) -> tuple[str | None, str | None]:
    """Return the token with all rights and the one for use, as ``read_token``.

    Raises:
        ValueError: A token is missing or unusable, or both are equal.
        OSError: A file cannot be read.
    """
    token = read_token(file, TOKEN_VARIABLE, environment)
    use_token = read_token(use_file, USE_TOKEN_VARIABLE, environment)
    if use_token and not token:
        raise ValueError(
            "a token for use needs a token with all rights too: give --token-file or set "
            f"{TOKEN_VARIABLE}"
        )
    if use_token and use_token == token:
        raise ValueError("the token for use is the token with all rights; they must differ")
    return token, use_token


def read_token(
    file: Path | None,
    variable: str = TOKEN_VARIABLE,
    environment: MutableMapping[str, str] = os.environ,
) -> str | None:
    """Return a token of callers, from a file or else from a variable of the environment.

    Removes the variable in either case, so that child processes do not inherit the token.

    Raises:
        ValueError: The configured token is missing or unusable. The message never contains
            the token.
        OSError: The file cannot be read.
    """
    given = environment.pop(variable, None)
    if file is not None:
        return _checked(file.read_bytes().decode(errors="replace").strip(), str(file))
    return None if given is None else _checked(given.strip(), variable)


def _checked(token: str, where: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise ValueError(
            f"the token in {where} has {len(token)} characters: it must have {_MIN_TOKEN_CHARS} "
            "or more, only visible ASCII without spaces; `openssl rand -hex 32` prints a good one"
        )
    return token


class UnauthenticatedError(Exception):
    """A call does not carry the server's token.

    Args:
        has: Description of the credential sent instead, never the token.
    """

    def __init__(self, has: str) -> None:
        super().__init__(
            f"this runner requires a token and the call has {has}; send the runner's token in the "
            "metadata, as `authorization: Bearer TOKEN`"
        )


class ForbiddenError(Exception):
    """A call carries the token for use, and its method needs the token with all rights.

    Args:
        text: Description of what is forbidden.
    """

    def __init__(
        self,
        text: str = "the token of this call may only use the loaded model: complete, tokenize, "
        "detokenize and read the status; send the runner's token with all rights",
    ) -> None:
        super().__init__(text)


class Tokens:
    """The tokens of a server, and their rights.

    Args:
        token: Token with all rights, sent by callers as ``authorization: Bearer TOKEN``.
        use_token: Token for methods that use the loaded model; None without one.
    """

    def __init__(self, token: str, use_token: str | None) -> None:
        # The token with all rights first.
        self._tokens = [each.encode() for each in (token, use_token) if each]

    def refusal(self, authorizations: Sequence[bytes], *, is_use: bool) -> Exception | None:
        """Return the error of a forbidden call; None for others.

        Args:
            authorizations: The values of all ``authorization`` headers.
            is_use: Whether the call only uses the loaded model.
        """
        sent = _bearer(authorizations)
        if sent is None:
            return UnauthenticatedError("none")
        # In constant time, because the duration must not reveal how much of a token is right.
        equal = [hmac.compare_digest(sent, each) for each in self._tokens]
        if not any(equal):
            return UnauthenticatedError("a different one")
        return None if equal[0] or is_use else ForbiddenError()


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a token before their request is read; health checks are exempt.

    Args:
        token: Token with all rights, sent by callers as ``authorization: Bearer TOKEN``.
        use_token: Token for ``USE_METHODS`` and reflection; None if there is no such token.
        translate: Returns the status for an ``UnauthenticatedError`` or a ``ForbiddenError``.
    """

    def __init__(
        self,
        token: str,
        use_token: str | None,
        translate: Callable[[Exception], status_pb2.Status],
    ) -> None:
        self._tokens = Tokens(token, use_token)
        self._translate = translate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Pass a permitted call on; answer others with UNAUTHENTICATED or PERMISSION_DENIED."""
        method = handler_call_details.method
        # Health probes usually have no token.
        if method.startswith(f"/{health.SERVICE_NAME}/"):
            return await continuation(handler_call_details)
        sent = _authorizations(handler_call_details)
        if error := self._tokens.refusal(sent, is_use=_is_use(method)):
            return _refusal(error, self._translate)
        return await continuation(handler_call_details)


def _is_use(method: str) -> bool:
    return method in _USE_PATHS or method.startswith(_REFLECTION)


def _authorizations(details: grpc.HandlerCallDetails) -> list[bytes]:
    return [
        value if isinstance(value, bytes) else value.encode(errors="replace")
        for key, value in details.invocation_metadata or ()
        if key == _HEADER
    ]


def _bearer(found: Sequence[bytes]) -> bytes | None:
    """Return the token of a call; None if absent or ambiguous."""
    if len(found) != 1 or found[0][: len(_SCHEME)].lower() != _SCHEME.encode():
        return None
    return found[0][len(_SCHEME) :].strip()


def _refusal(error: Exception, translate: Callable[[Exception], status_pb2.Status]) -> _Handler:
    async def refuse(_requests: object, context: _Context) -> None:
        await abort(context, translate(error))

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
