"""Limits of rendering a conversation."""

from __future__ import annotations

MAX_CPU_SECONDS = 5.0
"""CPU time of one rendering. A conversation of 10,000 messages takes the longest published
templates 0.3 s."""

MAX_WALL_SECONDS = 60.0
"""Time after which a rendering that uses no CPU time is given up."""

MAX_MEMORY_BYTES = 1 << 30
"""Memory that a rendering may add to its process. Linux only."""

MAX_PROMPT_CHARS = 64 * 2**20
"""Longest text. A request has at most as many bytes."""

MAX_KEPT_BYTES = 64 * 2**20
"""Memory above which the process is ended after an answer, because Python keeps most of it: 550 MiB
after a template that builds long texts. A conversation of 10,000 messages takes 32 MiB. Linux
only."""
