"""The answer to ``GetTokenizer``, which has the same messages in every contract of the gateway."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from smg_grpc_proto.generated import common_pb2

from runner_server.api.contracts.model_files import tokenizer_archive

CHUNK_BYTES = 64 * 1024
"""Bytes of the tokenizer's archive per message."""


async def tokenizer_chunks(directory: Path) -> AsyncIterator[Any]:
    """Yield the archive of a model's tokenizer files, as messages.

    Raises:
        GenerationFailed: The files can no longer be read.
    """
    data = await asyncio.to_thread(tokenizer_archive, directory)
    digest = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
    for chunk in split(data, digest):
        yield chunk


def split(data: bytes, digest: str) -> Iterator[Any]:
    """Yield messages with at most ``CHUNK_BYTES`` of an archive; the last has its SHA-256."""
    for at in range(0, len(data), CHUNK_BYTES):
        part = data[at : at + CHUNK_BYTES]
        is_last = at + CHUNK_BYTES >= len(data)
        yield common_pb2.GetTokenizerChunk(data=part, sha256=digest if is_last else "")
