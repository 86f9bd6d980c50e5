"""``mlx-runner pull``: estimate and download a model of the hub."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from runner_client.cli.shared.errors import EXIT_CODES
from runner_client.cli.shared.estimates import judge, verdict_rows, verdict_values
from runner_client.cli.shared.options import json_option, load_options, text
from runner_client.cli.shared.output import Progress, StepLine, print_json, print_rows
from runner_client.errors import NotSupportedError
from runner_client.memory.gate import MemoryGate
from runner_common.extras import install_advice
from runner_common.model_directory import hub_cache
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from typing import Any

    from runner_client.cli.shared.output import Row
    from runner_client.memory.estimation import MemoryEstimate
    from runner_client.memory.gate import GateDecision
    from runner_client.pull.plan import PullPlan
    from runner_client.types import Dtype, LoadOptions

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_REVISION = re.compile(r"[^\s\0~^:?*\[\\]+")


@click.command("pull", short_help="Download a model from the hub, if it fits.", epilog=EXIT_CODES)
@click.argument("model", metavar="ORG/NAME", type=text)
@click.option(
    "--revision", metavar="NAME", help="Branch, tag or commit.  [default: the main branch]"
)
@click.option("--dry-run", is_flag=True, help="Estimate only, and keep nothing.")
@load_options("context_length", "parallel", "dtype", "memory_override", "allow_inexact", "kv_bits")
@json_option
def command(
    model: str, *, revision: str | None, dry_run: bool, load: LoadOptions, as_json: bool
) -> None:
    """Download a model into the local Hugging Face cache, where other commands find it.

    ORG/NAME is a repository on the hub; ORG/NAME@REVISION is the same as --revision. First the
    model's memory is estimated from its small files and the headers of its weights, for the given
    options, and a model that cannot be loaded or does not fit this machine now is refused. Only
    files that a runner reads are fetched; an interrupted download continues where it ended, and
    every file is verified by its checksum. HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_CACHE apply.
    The extra pull has the packages that this needs.
    """
    name, revision = _name_and_revision(model, revision)
    if find_spec("huggingface_hub") is None:
        raise NotSupportedError(f"pull needs huggingface_hub: {install_advice('pull')}")
    # Slow to import, and missing from the base install.
    from runner_client.pull.plan import planned  # noqa: PLC0415

    with (
        tempfile.TemporaryDirectory(prefix="mlx-runner-pull-") as folder,
        StepLine() as show_step,
    ):
        show_step(f"reading {name}")
        plan = planned(name, revision, hub_cache(os.environ), Path(folder).resolve())
        show_step(f"estimating {name}")

        def estimated(dtype: Dtype) -> MemoryEstimate:
            return plan.estimate(replace(load, dtype=dtype))

        need, decision = judge(estimated, load)
        show_step("")
        shown = _Shown(plan, need, decision, as_json=as_json)
        shown.announce()
        if decision is not None and not decision.fits:
            try:
                MemoryGate().check(need, override=load.memory_override)
            except Exception:
                # With --json, the numbers are printed before the refusal, too.
                shown.conclude(None)
                raise
        if dry_run:
            shown.conclude(None)
            return
        plan.require_disk()
        with Progress(f"fetching {name}") as progress:
            path = plan.run(progress.show)
        shown.conclude(path)


def _name_and_revision(model: str, revision: str | None) -> tuple[str, str | None]:
    """Return the name of the repository, and the revision from the name or the option.

    Raises:
        click.UsageError: The name is not one of the hub, or there are two revisions.
    """
    name, at, named = model.partition("@")
    if not _NAME.fullmatch(name) or ".." in name:
        raise click.BadArgumentUsage(f"{model!r} is not the name of a model on the hub (org/name)")
    if at and revision is not None:
        raise click.UsageError("give the revision once: in the name, or by --revision")
    revision = named if at else revision
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise click.UsageError(f"{revision!r} is not a branch, a tag or a commit")
    return name, revision


class _Shown:
    """Output of the command: rows on the way, or one JSON object at the end."""

    def __init__(
        self,
        plan: PullPlan,
        need: MemoryEstimate,
        decision: GateDecision | None,
        *,
        as_json: bool,
    ) -> None:
        self._plan = plan
        self._need = need
        self._decision = decision
        self._as_json = as_json
        self._fetch_bytes = plan.missing_bytes

    def announce(self) -> None:
        if not self._as_json:
            print_rows([*verdict_rows(self._need, self._decision), *self._plan_rows()])

    def conclude(self, path: Path | None) -> None:
        if self._as_json:
            print_json(self._values(path))
        elif path is not None:
            print_rows([("in", str(path)), ("next", f'mlx-runner run {self._plan.name} "..."')])

    def _plan_rows(self) -> list[Row]:
        files = self._plan.files
        names = ", ".join(file.name for file in files)
        total = format_bytes(sum(file.size for file in files))
        return [
            ("commit", self._plan.commit),
            ("to fetch", f"{format_bytes(self._fetch_bytes)} of {total}: {names}"),
            ("disk", f"{format_bytes(self._plan.free_bytes)} free"),
        ]

    def _values(self, path: Path | None) -> dict[str, Any]:
        return {
            **verdict_values(self._need, self._decision),
            "model": self._plan.name,
            "commit": self._plan.commit,
            "files": [{"name": file.name, "bytes": file.size} for file in self._plan.files],
            "fetch_bytes": self._fetch_bytes,
            "disk_free_bytes": self._plan.free_bytes,
            "path": None if path is None else str(path),
        }
