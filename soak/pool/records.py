"""Data of a pool soak: requests, samples, phases and the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from soak.records import Tally
from soak.session import Settings

UNKNOWN = "unknown"
"""Model of a runner that was gone before anyone could say which model it was for."""

STOPPING = "stopping"
"""Model of a runner that has been told to stop, and takes no more memory."""


@dataclass(frozen=True, slots=True)
class PoolOrder:
    """A request with the planned behaviour of the caller.

    Attributes:
        model: Name of the model.
        prompt: Index of the prompt among the known prompts.
        count: Number of tokens to generate.
        pause_seconds: Pause before the request.
        may_evict: Whether other models may be evicted for the model.
        timeout_seconds: How long to wait for the model.
        cancel_seconds: Time from sending to cancelling, wherever the request is by then.
        cancel_tokens: Number of tokens after which to cancel.
        may_be_short: Whether others hold memory that the pool cannot take back.
    """

    model: str
    prompt: int
    count: int
    pause_seconds: float = 0.0
    may_evict: bool = True
    timeout_seconds: float | None = None
    cancel_seconds: float | None = None
    cancel_tokens: int | None = None
    may_be_short: bool = False


@dataclass(frozen=True, slots=True)
class PoolSample:
    """State of all runners and of the process with the pools, at one moment.

    Attributes:
        seconds: Time since the start of the phase.
        runners: Model and resident set, in bytes, of each runner's process.
        pss_bytes: Proportional set of all runners.
        descriptors: Open file descriptors of the process with the pools.
        threads: Threads of that process.
        rss_bytes: Resident set of that process.
        zombies: Children of that process that have exited and are not reaped.
    """

    seconds: float
    runners: tuple[tuple[str, int], ...] = ()
    pss_bytes: int = 0
    descriptors: int = 0
    threads: int = 0
    rss_bytes: int = 0
    zombies: tuple[int, ...] = ()

    @property
    def held_bytes(self) -> int:
        """Resident set of all runners together."""
        return sum(size for _, size in self.runners)

    def by_model(self) -> Counter[str]:
        """Return the resident set of the runners of each model."""
        sizes = Counter[str]()
        for model, size in self.runners:
            sizes[model] += size
        return sizes


@dataclass(frozen=True, slots=True)
class Rest:
    """State of the process once every pool is closed, compared with the state before the phase.

    Attributes:
        runners: Runners that are still alive.
        zombies: Children that are not reaped.
        descriptors: Additional open file descriptors.
    """

    runners: int
    zombies: int
    descriptors: int


@dataclass
class Phase:
    """Part of a run: some schedulers, their callers, and the memory they share.

    Attributes:
        name: Name of the phase.
        seconds: Duration of the load.
        limit_bytes: Memory that all runners may take together.
        needs: Estimated need of each model, in bytes.
        schedulers: Names of the schedulers.
        tally: Outcomes of the requests.
        served: Finished requests by scheduler.
        loads: Runners started, by model.
        samples: Samples in chronological order.
        rest: State after the phase; None if it was not reached.
    """

    name: str
    seconds: float
    limit_bytes: int
    needs: Mapping[str, int]
    schedulers: frozenset[str]
    tally: Tally = field(default_factory=Tally)
    served: Counter[str] = field(default_factory=Counter)
    loads: Counter[str] = field(default_factory=Counter)
    samples: list[PoolSample] = field(default_factory=list)
    rest: Rest | None = None

    def promised_bytes(self, sample: PoolSample) -> int:
        """Return the needs of the runners that were alive at the time of a sample.

        A runner of an unknown model counts as the smallest one, and one that stops counts with its
        resident set.
        """
        least = min(self.needs.values())
        return sum(
            size if model == STOPPING else self.needs.get(model, least)
            for model, size in sample.runners
        )


@dataclass
class PoolRun:
    """Results of a pool soak.

    Attributes:
        settings: Settings of the soak.
        about: Machine, versions and time of the run.
        phases: Parts of the run.
        tracebacks: Number of tracebacks in the log of pools and runners.
    """

    settings: Settings
    about: dict[str, Any] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)
    tracebacks: int = 0
