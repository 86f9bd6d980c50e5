"""Adapters of a load and of a loaded model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter to load with a model.

    Attributes:
        name: The name by which requests select it.
        path: Its directory.
    """

    name: str
    path: str


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter of a loaded model.

    Attributes:
        name: The name by which requests select it.
        path: Its directory.
        digest: Digest of its files.
    """

    name: str
    path: str
    digest: str

    def cache_salt(self, salt: str) -> str:
        """Return the salt of the prefix cache for a request with this adapter.

        Keys and values depend on the adapter, so requests share entries only if the digests are
        the same. The result is longer than the salt of any request, so no request without an
        adapter can have it.

        Args:
            salt: The salt of the request.
        """
        return f"{hashlib.sha512(self.digest.encode()).hexdigest()}/{salt}"
