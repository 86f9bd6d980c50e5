"""Failure of a download."""

from __future__ import annotations

from runner_client.errors import RunnerError


class PullError(RunnerError):
    """A model was not downloaded. The message says why, and what to do.

    Fetched bytes stay in the cache; the next pull continues from there.
    """
