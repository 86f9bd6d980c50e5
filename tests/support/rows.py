"""Batches of a real model, driven without a server."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from runner_server.engine.backend import LoadedModel, Matcher
from runner_server.engine.logprobs import TokenLogprob
from runner_server.engine.types import CachePolicy, Prefill, Sampling, Token
from tools.local_batch import LocalBatch

GREEDY = Sampling(temperature=0)
MAX_STEPS = 5000


@dataclass
class Row:
    """One row of a batch.

    Attributes:
        late: Step before which the row is added.
        matcher: Constrains the row.
        ends: Tokens after which the row ends before ``count``.
        may_be_drafted: Whether tokens are drafted while the row is alone.
        accepted: Number of tokens that were drafted.
        adapter: Name of the adapter; also the salt of the prefix cache.
    """

    prompt: Sequence[int]
    count: int
    sampling: Sampling = GREEDY
    late: int = 0
    matcher: Matcher | None = None
    ends: Collection[int] = ()
    may_be_drafted: bool = False
    accepted: int = 0
    adapter: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    progress: list[tuple[int, int]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """True if the row has its last token."""
        return len(self.ids) >= self.count or bool({*self.ids[-1:]} & {*self.ends})


def run_rows(batch: LocalBatch, rows: Sequence[Row]) -> list[list[int]]:
    """Run rows until each is over; return the tokens of each."""
    waiting = dict(enumerate(rows))
    active: dict[int, Row] = {}
    for step in range(MAX_STEPS):
        for id_ in [id_ for id_, row in waiting.items() if row.late <= step]:
            row = active[id_] = waiting.pop(id_)
            most = row.count if row.may_be_drafted else 0
            batch.add(
                id_,
                row.prompt,
                row.sampling,
                CachePolicy(salt=row.adapter),
                matcher=row.matcher,
                max_drafted=most,
                adapter=row.adapter,
            )
        if active:
            _step(batch, active)
        elif not waiting:
            return [row.ids for row in rows]
    raise AssertionError("the rows do not end")


def _step(batch: LocalBatch, active: dict[int, Row]) -> None:
    for event in batch.step():
        row = active[event.row]
        if isinstance(event, Prefill):
            assert not row.ids, "progress after a token"
            row.progress.append((event.prefilled, event.total))
            continue
        assert isinstance(event, Token)
        row.ids.append(event.token_id)
        row.accepted += event.is_drafted
        if event.logprob:
            row.logprobs.append(event.logprob)
    ended = [id_ for id_, row in active.items() if row.is_over]
    if ended:
        batch.remove(ended)
    for id_ in ended:
        del active[id_]


def run_together(model: LoadedModel, rows: Sequence[Row]) -> list[list[int]]:
    """Run rows in one batch of their own and return the tokens of each."""
    batch = LocalBatch.of(model)
    try:
        return run_rows(batch, rows)
    finally:
        batch.close()


def run_alone(model: LoadedModel, row: Row) -> list[int]:
    """Run a row in a batch without others and return the tokens.

    Not a constrained row, whose matcher would be used twice.
    """
    assert row.matcher is None
    return run_together(model, [Row(row.prompt, row.count, row.sampling, adapter=row.adapter)])[0]
