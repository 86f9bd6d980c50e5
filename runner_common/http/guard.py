"""Checks of HTTP requests: tokens and host names."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from runner_common.serving.auth import ForbiddenError, Tokens

if TYPE_CHECKING:
    from runner_common.http.exchange import Exchange

_LOCAL = "localhost"


class Guard:
    """Refuses requests without the server's token.

    A server without token and TLS listens on loopback addresses only, but pages of other sites can
    reach those through the user's browser, once the name of the site resolves to 127.0.0.1 (DNS
    rebinding). Such requests have the site's name as ``host``, so that only addresses and
    ``localhost`` are accepted there.

    Args:
        token: Token with all rights; None requires none.
        use_token: Token for routes that only use models; None without one.
        is_encrypted: Whether the server has a certificate, which other sites do not have.
    """

    def __init__(self, token: str | None, use_token: str | None, *, is_encrypted: bool) -> None:
        self._tokens = Tokens(token, use_token) if token else None
        self._checks_name = not (token or is_encrypted)

    def check(self, exchange: Exchange, *, is_use: bool) -> None:
        """Check a request.

        Args:
            exchange: The request.
            is_use: Whether the route only uses models, and does not control the process.

        Raises:
            UnauthenticatedError: The token is missing or wrong.
            ForbiddenError: The token is the one for use, and the route needs all rights; or the
                request is for another site's name.
        """
        if self._tokens and (error := self._tokens.refusal(exchange.authorizations, is_use=is_use)):
            raise error
        if self._checks_name and not _is_local(exchange.headers.get("host", _LOCAL)):
            raise ForbiddenError(
                "the request is for another host name than localhost, and this server has no token "
                "(--token-file), so that any web site could call it; use http://localhost or the "
                "address"
            )

    def has_all_rights(self, exchange: Exchange) -> bool:
        """Return whether the caller may control the process, and not only use models."""
        return not (self._tokens and self._tokens.refusal(exchange.authorizations, is_use=False))


def _is_local(host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    name = name.strip("[]").lower()
    if name == _LOCAL or name.endswith(f".{_LOCAL}"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
