"""Names of running requests, for ``Abort``. Callers choose the names, which need not be unique."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from runner_server.api.violations import ViolationCollector

MAX_ABORTED = 1024
"""Most requests that one ``Abort`` may name: looking up millions would block the event loop."""


@dataclass
class _Holders:
    """The running requests with one name.

    Attributes:
        ends: Functions that end each of the requests.
        is_shared: Whether two requests ever had the name at the same time; stays set until the
            last one ends.
    """

    ends: list[Callable[[], None]] = field(default_factory=list)
    is_shared: bool = False


class Names:
    """Registry of the running requests by name. For use on the event loop only.

    :meth:`abort` ignores a name that two requests have shared, even if one of them has ended,
    because it could end another caller's request. A caller can always cancel its own call instead.
    """

    def __init__(self) -> None:
        self._holders: dict[str, _Holders] = {}

    @contextmanager
    def held(self, name: str, end: Callable[[], None]) -> Iterator[None]:
        """Register a running request under a name; ignore an empty name.

        Args:
            name: The caller's name for the request.
            end: Called to end the request.
        """
        if not name:
            yield
            return
        holders = self._holders.setdefault(name, _Holders())
        holders.is_shared = holders.is_shared or bool(holders.ends)
        holders.ends.append(end)
        try:
            yield
        finally:
            holders.ends.remove(end)
            if not holders.ends:
                del self._holders[name]

    def abort(self, name: str) -> None:
        """End the request with a name. No-op if the name is unknown or was shared."""
        holders = self._holders.get(name)
        if holders and not holders.is_shared:
            for end in holders.ends:
                end()


def check_abort(names: Sequence[str]) -> None:
    """Check the number of requests named in an ``Abort``.

    Raises:
        InvalidField: There are too many.
    """
    check = ViolationCollector()
    count = len(names)
    check.require("request_ids", count <= MAX_ABORTED, f"{count}; at most {MAX_ABORTED}")
    check.finish()
