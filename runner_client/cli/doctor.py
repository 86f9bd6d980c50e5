"""``mlx-runner doctor``: check this machine for a runner, and advise on problems."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from runner_client.cli.shared.options import json_option
from runner_client.cli.shared.output import StepLine, print_json
from runner_client.host import doctor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from runner_client.host.doctor import Finding

EXIT_ERROR_FOUND = 1

_COLORS = {"ok": "green", "warning": "yellow", "error": "red"}


@click.command(
    "doctor",
    short_help="Check and measure this machine for a runner.",
    epilog="Exit codes: 0 success (no error, though maybe warnings), 1 an error: a runner cannot "
    "start here, 2 wrong usage, 130 interrupted.",
)
@json_option
def command(*, as_json: bool) -> None:
    """Check everything a runner depends on, and advise on problems.

    Takes some seconds: MLX is started in a separate process and measured, on a Linux CPU with each
    BLAS library found. The fastest is remembered and used by every runner started later (serve
    --blas overrides it). A warning says so if other processes kept the machine busy meanwhile.
    """
    with StepLine() as progress:
        findings = doctor.examine(progress=progress)
    is_fine = all(finding.status != "error" for finding in findings)
    if as_json:
        print_json({"ok": is_fine, "findings": [asdict(finding) for finding in findings]})
    else:
        for line in _lines(findings):
            click.echo(line)
    if not is_fine:
        raise click.exceptions.Exit(EXIT_ERROR_FOUND)


def _lines(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield a line for each finding, followed by any advice."""
    width = max((len(finding.name) for finding in findings), default=0)
    indent = " " * len("warning  ")
    for finding in findings:
        mark = click.style(f"{finding.status:<7}", fg=_COLORS[finding.status])
        first, *more = finding.value.splitlines() or [""]
        yield f"{mark}  {finding.name:<{width}}  {first}"
        yield from (f"{indent}{line}" for line in more)
        if finding.advice:
            yield f"{indent}{finding.advice}"
