"""Which running request an ``Abort`` means: its caller's name for it need not be its alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class _Holders:
    """The running requests of one name; ``is_shared`` stays until the last has ended."""

    ends: list[Callable[[], None]] = field(default_factory=list)
    is_shared: bool = False


class Names:
    """The names of running requests. It belongs to the event loop.

    A name that two of them have, or had while one of them still runs, means neither: whoever
    leaves says so by ending its own call, which always ends that request and no other.
    """

    def __init__(self) -> None:
        self._holders: dict[str, _Holders] = {}

    @contextmanager
    def held(self, name: str, end: Callable[[], None]) -> Iterator[None]:
        """Gives a request its name while it runs; an empty one is none.

        Args:
            name: The caller's name for it.
            end: Ends it.
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
        """Ends the request of that name; nothing happens if there is none, or not just one."""
        holders = self._holders.get(name)
        if holders and not holders.is_shared:
            for end in holders.ends:
                end()
