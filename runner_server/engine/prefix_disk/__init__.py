"""Prefix cache on disk: a second tier below the prefix cache in memory, which survives the process.

:mod:`tier` decides on the engine's thread which blocks are written and read. :mod:`store` keeps the
files of a directory within a byte budget, on two threads of its own. :mod:`block_files` is the
format of a file, and :mod:`names` names blocks by their content.
"""

from runner_server.engine.prefix_disk.names import BLOCK_TOKENS
from runner_server.engine.prefix_disk.store import BlockStore, DiskCounters, PrefixDiskSettings
from runner_server.engine.prefix_disk.tier import (
    BUFFERED_BLOCKS,
    BUFFERED_TOKENS,
    BlockOps,
    DiskTier,
)

__all__ = [
    "BLOCK_TOKENS",
    "BUFFERED_BLOCKS",
    "BUFFERED_TOKENS",
    "BlockOps",
    "BlockStore",
    "DiskCounters",
    "DiskTier",
    "PrefixDiskSettings",
]
