"""Run ``runner_server.mlx_backend.probe`` in a child with the environment of a runner."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runner_common.interpreter import interpreter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PROBE_TIMEOUT_SECONDS = 60.0
_STDERR_LINES = 5
_PROBE = ("-P", "-m", "runner_server.mlx_backend.probe")
_SPEED = (*_PROBE, "--gemm")
_KERNELS = (*_PROBE, "--kernels")


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Output of a probe, or the reason for a failure.

    Attributes:
        facts: The JSON object of ``runner_server.mlx_backend.probe``; empty on failure.
        failure: The reason, with the last lines of stderr; empty on success.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""


def run_probe(
    environment: Mapping[str, str],
    *,
    arguments: Sequence[str] = _SPEED,
    timeout_seconds: float = PROBE_TIMEOUT_SECONDS,
) -> ProbeResult:
    """Run the probe with ``--gemm`` in the given environment. Never raises."""
    try:
        done = subprocess.run(
            [interpreter(), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return ProbeResult(failure=f"the probe did not run: {error}")
    try:
        facts = json.loads(done.stdout)
    except ValueError:
        facts = None
    if done.returncode == 0 and isinstance(facts, dict):
        return ProbeResult(facts)
    tail = "\n".join(done.stderr.splitlines()[-_STDERR_LINES:])
    return ProbeResult(failure=f"the probe ended with exit code {done.returncode}:\n{tail}")


def run_kernels_probe(environment: Mapping[str, str]) -> ProbeResult:
    """Run the probe with ``--kernels`` in the given environment. Never raises.

    Compiling takes a second or two, so that measurements of speed leave it out.
    """
    return run_probe(environment, arguments=_KERNELS)
