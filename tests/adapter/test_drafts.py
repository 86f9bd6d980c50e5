"""Drafts change the speed of a row, and never its tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapter.test_constraints import KINDS, matcher, row
from adapter.test_finite import POISON, poisoned_dir
from runner_server.engine.backend import LoadedModel
from runner_server.engine.types import Constraint, NotFinite, Sampling, Token
from runner_server.engine.work import DecodeItem
from support.harness import Server, running, tokens
from support.logprobs import assert_logprobs_close
from support.rows import GREEDY, Row, run_alone, run_together
from tools.local_batch import decode_with_drafts, start_alone
from tools.memory.models import scaled, write_model

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend import MlxBackend  # noqa: E402

DEMO = Path(__file__).parents[2] / "runner_server/demo/model"

__all__ = ["poisoned_dir"]

SAMPLINGS = {
    "greedy": GREEDY,
    "repeat penalty": replace(GREEDY, repeat_penalty=1.3),
    "frequency penalty": replace(GREEDY, frequency_penalty=0.4, repeat_last_n=-1),
    "output only": Sampling(seed=4, presence_penalty=0.5, counts_output_only=True),
    "bias": replace(GREEDY, logit_bias=((5, 3.0), (9, -100.0))),
    "min_predict": Sampling(seed=3, min_predict=9, end_ids=tuple(range(0, 2048, 3))),
    "whole vocabulary": Sampling(seed=4, top_k=0, top_p=1.0, temperature=1.1),
    "nucleus": Sampling(seed=6, top_k=0, top_p=0.9),
    "logprobs": Sampling(seed=5, logprobs=3, logprob_token_ids=(7, 8)),
}
COUNT = 40


def _prompt(model: LoadedModel) -> list[int]:
    text = "class Stream:\n    def read(self, size):\n        return self.file.read(size)\n\n"
    return model.codec.encode(text * 3, as_prompt=True)


def _wrong_here_and_there(model: LoadedModel, ids: Sequence[int]) -> Callable[[int], list[int]]:
    """Return a function that drafts what follows the first tokens of a text, often with a fault."""
    pick = random.Random(1)  # noqa: S311 - chooses drafts

    def draft(done: int) -> list[int]:
        drafted = list(ids[done : done + pick.randrange(8)])
        if drafted and pick.random() < 0.6:
            wrong = pick.randrange(len(drafted))
            drafted[wrong] = (drafted[wrong] + 1) % model.info.vocab_size
        return drafted

    return draft


def _compare(model: LoadedModel, prompt: Sequence[int], sampling: Sampling) -> None:
    """Compare a row without drafts and one with drafts that are wrong here and there."""
    expected, _ = decode_with_drafts(start_alone(model, prompt, sampling), COUNT + 8, lambda _: ())
    ids = [token.token_id for token in expected]
    draft = _wrong_here_and_there(model, ids)
    tokens, drafted = decode_with_drafts(start_alone(model, prompt, sampling), COUNT, draft)
    assert 0 < sum(token.is_drafted for token in tokens) < drafted
    if sampling.logprobs is None:
        assert [token.token_id for token in tokens] == ids[:COUNT]
    else:
        own, other = ([each.logprob for each in run if each.logprob] for run in (tokens, expected))
        assert len(own) == COUNT
        assert_logprobs_close(own, other)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_right_and_wrong_drafts_leave_the_tokens_as_they_are(
    trained: LoadedModel, sampling: Sampling
) -> None:
    _compare(trained, _prompt(trained), sampling)


@pytest.mark.parametrize("constraint", KINDS, ids=lambda each: each.kind)
def test_constraints_apply_to_each_drafted_token(
    trained: LoadedModel, constraint: Constraint
) -> None:
    sampling = Sampling(seed=2, top_k=0, top_p=1.0, logprobs=1)
    plain = row(trained, constraint, sampling)
    run_together(trained, [plain])
    draft = _wrong_here_and_there(trained, plain.ids)
    own = start_alone(trained, plain.prompt, sampling, matcher(trained, constraint))
    tokens, drafted = decode_with_drafts(own, len(plain.ids), draft)
    assert [token.token_id for token in tokens] == plain.ids
    # A wrong token that the constraint excludes ends the draft before it is checked.
    accepted = sum(token.is_drafted for token in tokens)
    assert accepted <= drafted
    assert accepted or len(plain.ids) < 4


@pytest.mark.parametrize("shape", ["llama", "qwen3"])
def test_other_models_check_drafts_alike(
    load: Callable[..., LoadedModel], model_dir: Callable[..., Path], shape: str
) -> None:
    model = load(model_dir(shape), parallel=4)
    _compare(model, [5, 6, 7, 8] * 10, replace(GREEDY, logprobs=5))


def test_rows_may_join_and_leave_while_tokens_are_drafted(trained: LoadedModel) -> None:
    prompt = _prompt(trained)
    expected = [run_alone(trained, Row(prompt, 60)), run_alone(trained, Row(prompt[5:], 4))]
    accepted = []
    for late in (3, 6, 9):
        rows = [Row(prompt, 60, may_be_drafted=True), Row(prompt[5:], 4, late=late)]
        assert run_together(trained, rows) == expected
        accepted.append(rows[0].accepted)
    assert all(accepted)


def test_a_row_may_be_preempted_after_a_draft(trained: LoadedModel) -> None:
    prompt = _prompt(trained)
    ids = run_alone(trained, Row(prompt, 30))
    for wrong in (0, 1):
        executor = start_alone(trained, prompt, GREEDY)
        events = [*executor.run(DecodeItem(joining=(0,))).events]
        while len(events) < 30:
            known = ids[len(events) : len(events) + 3]
            events += executor.run(DecodeItem(draft=(*known, 2047 * wrong))).events
            executor.preempt(0)
            events += executor.run(DecodeItem(joining=(0,))).events
        executor.close()
        tokens = [event.token_id for event in events if isinstance(event, Token)]
        assert tokens[:30] == ids


def test_logits_that_are_not_finite_end_a_row_only_where_it_gets_to(
    load: Callable[..., LoadedModel], poisoned_dir: Path
) -> None:
    model = load(poisoned_dir, parallel=2)
    for token in (9, POISON):
        executor = start_alone(model, [5, 6], replace(GREEDY, logit_bias=((token, 100.0),)))
        assert executor.run(DecodeItem(joining=(0,))).events == (Token(0, token),)
        report = executor.run(DecodeItem(draft=(9, POISON, 9)))
        # The step without a draft, which yields its token in the next one.
        assert (report.drafted, report.events) == (0, ())
        last = NotFinite(0) if token == POISON else Token(0, 9)
        assert executor.run(DecodeItem()).events == (last,)
        executor.close()


def test_a_model_whose_tokens_attend_to_later_ones_takes_no_drafts(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """Such as phi3small in mlx_lm 0.32.2; tokens are compared with single steps of the model."""
    write_model(tmp_path, scaled("phi3small"))
    assert load(tmp_path, parallel=1, allow_inexact=True).max_draft == 0


@pytest.mark.parametrize("shape", ["gemma3", "mamba2", "lfm2"])
def test_caches_that_cannot_be_cut_back_take_no_drafts(
    load: Callable[..., LoadedModel], model_dir: Callable[..., Path], shape: str
) -> None:
    assert load(model_dir(shape), parallel=2).max_draft == 0


def test_drafts_fit_the_working_memory(
    load: Callable[..., LoadedModel], model_dir: Callable[..., Path]
) -> None:
    wide = load(model_dir(vocab_size=120_000), parallel=1, context_length=64)
    assert 0 <= wide.max_draft < 16
    assert load(model_dir(), parallel=1, context_length=64).max_draft == 16


@pytest.mark.parametrize("most", [0, 16])
async def test_the_last_message_and_the_metrics_count_drafts(socket_dir: Path, most: int) -> None:
    backend: Any = MlxBackend()
    async with running(socket_dir, backend, draft_tokens=most) as (app, channel, ready):
        server = Server(app, backend, channel, ready)
        await server.load(str(DEMO))
        # One token, again and again: the first draft is right, and there may be no second one if
        # the machine is busy while the first is checked.
        messages = await server.complete(num_predict=60, temperature=0, logit_bias={5: 100.0})
    last = messages[-1]
    assert last.eval_count == sum(len(message.token_ids) for message in messages) == 60
    if most:
        assert 0 < last.draft_accepted_count <= last.drafted_count
    else:
        assert (last.draft_accepted_count, last.drafted_count) == (0, 0)


async def test_a_text_may_end_within_a_draft(socket_dir: Path) -> None:
    backend: Any = MlxBackend()
    prompt = "    def read(self, size):\n        return self.file.read(size)\n\n" * 4
    async with running(socket_dir, backend) as (app, channel, ready):
        server = Server(app, backend, channel, ready)
        await server.load(str(DEMO))
        whole = await server.complete(prompt, num_predict=60, temperature=0, ignore_eos=True)
        ids = tokens(whole)
        for end in range(30, 40):
            options: dict[str, Any] = {"stop_token_ids": [ids[end]], "num_predict": 60}
            messages = await server.complete(prompt, temperature=0, **options)
            assert tokens(messages) == ids[: ids.index(ids[end]) + 1]
            assert messages[-1].draft_accepted_count <= messages[-1].eval_count
