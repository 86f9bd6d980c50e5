"""Start and stop a runner several times; ``python tests/support/process_cycles.py MODEL CYCLES``.

A process of its own, because the resident set of a test process depends on the tests before it.
It does not end if a cycle leaves a thread behind.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from dataclasses import asdict, dataclass

import psutil

from runner_client import Options, RunnerProcess
from runner_client.rpc.transport import watchdog


@dataclass(frozen=True)
class Cycle:
    """Resources of this process after a runner was started, used and closed.

    Attributes:
        pid: Process id of the runner.
        resident_bytes: Resident set of this process.
        descriptors: Open descriptors of this process.
    """

    pid: int
    resident_bytes: int
    descriptors: int


def main(model: str, cycles: int) -> None:
    """Print the cycles, as JSON."""
    # A watchdog waits for the next call, longer than a cycle takes; here it ends with its cycle.
    watchdog._LINGER_SECONDS = 0.01
    done = [_cycle(model) for _ in range(cycles)]
    sys.stdout.write(json.dumps([asdict(cycle) for cycle in done]))


def _cycle(model: str) -> Cycle:
    with RunnerProcess(model, listen="unix") as runner:
        options = Options(num_predict=8, temperature=0, logit_bias={0: -100})
        assert runner.complete("def", options=options).eval_count == 8
        pid = runner.pid or 0
    while threading.active_count() > 1:
        time.sleep(0.01)
    gc.collect()
    me = psutil.Process()
    return Cycle(pid, me.memory_info().rss, me.num_fds())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
