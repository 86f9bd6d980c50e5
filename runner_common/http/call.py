"""An HTTP request as a call of a service."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING, Any, NoReturn

from google.rpc import status_pb2

from runner_common.http.host import StatusError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    import grpc

ID_HEADER = "x-request-id"
"""Header with the id of a call, in both directions."""

_ID = re.compile(r"[!-~]{1,128}")
_DETAILS_KEY = "grpc-status-details-bin"


async def _nothing() -> None:
    pass


class HttpCall:
    """A call by HTTP, as the ``CallContext`` of services.

    Args:
        path: Path of the route, with its parameters by name, such as ``/v1/models/{model:path}``.
        headers: Headers of the request, in lower case.
        on_accept: Awaited once the request is accepted, before its first output.

    Attributes:
        id: The caller's ``x-request-id``, or a random id.
    """

    def __init__(
        self,
        path: str,
        headers: Iterable[tuple[str, str]] = (),
        on_accept: Callable[[], Awaitable[None]] = _nothing,
    ) -> None:
        self.path = path
        given = dict(headers)
        sent = given.get(ID_HEADER, "")
        self.id = sent if _ID.fullmatch(sent) else secrets.token_hex(8)
        self.headers = tuple((given | {ID_HEADER: self.id}).items())
        self._on_accept = on_accept

    def accepting(self, on_accept: Callable[[], Awaitable[None]]) -> HttpCall:
        """Return the same call with another ``on_accept``."""
        return HttpCall(self.path, self.headers, on_accept)

    async def send_initial_metadata(self, _metadata: object, /) -> None:
        """Note the acceptance of the request."""
        await self._on_accept()

    def invocation_metadata(self) -> Any:  # noqa: ANN401 - see CallContext
        """Return the headers as pairs."""
        return self.headers

    def time_remaining(self) -> None:
        """Return None, because HTTP requests have no deadline."""

    async def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        trailing_metadata: Any = (),  # noqa: ANN401 - see CallContext
    ) -> NoReturn:
        """Raise :class:`StatusError` with a status from a call by gRPC."""
        packed = dict(trailing_metadata).get(_DETAILS_KEY)
        if isinstance(packed, bytes):
            raise StatusError(status_pb2.Status.FromString(packed))
        raise StatusError(status_pb2.Status(code=code.value[0], message=details))
