"""Constrained rows of a real model, alone and beside other rows."""

from __future__ import annotations

import gc
import json
import random
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from runner_server.engine.backend import LoadedModel, Matcher
from runner_server.engine.types import Constraint, NoLegalToken, Sampling
from runner_server.mlx_backend.sampling import constrained
from support.models import VOCAB_SIZE
from support.rows import GREEDY, Row, run_alone, run_together
from support.sweeps import diagonal
from tools.local_batch import LocalBatch

PROMPT = list(b"once upon")
RECORD = Constraint(
    "json_schema",
    (
        json.dumps(
            {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 5},
                    "count": {"type": "integer", "minimum": 10, "maximum": 99},
                    "kinds": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
                },
                "required": ["name", "count", "kinds"],
                "additionalProperties": False,
            }
        ),
    ),
)
WORDS = Constraint("regex", (r"[a-z]{2,6}( [a-z]{2,6}){1,3}\.",))
SUM = Constraint("lark", ('start: term "+" term\nterm: /[0-9]{1,3}/ | "(" /[0-9]/ ")"',))
ANSWER = Constraint("choice", ("yes", "no", "yes and no"))
KINDS = (RECORD, WORDS, SUM, ANSWER)

SAMPLINGS = (
    GREEDY,
    Sampling(seed=1),
    Sampling(seed=2, top_k=0, top_p=1.0),
    Sampling(seed=3, top_k=0, top_p=0.7),
    Sampling(seed=4, repeat_penalty=1.3, presence_penalty=0.5, min_p=0.05),
)


def matcher(model: LoadedModel, constraint: Constraint) -> Matcher:
    return model.grammars.compile(constraint).result(timeout=60).start()


def row(model: LoadedModel, constraint: Constraint, sampling: Sampling, late: int = 0) -> Row:
    ends = model.info.eos_token_ids
    return Row(PROMPT, 300, sampling, late, matcher(model, constraint), ends)


def text(model: LoadedModel, done: Row) -> str:
    """Return the text of a row after its own end."""
    *ids, end = done.ids
    assert end in model.info.eos_token_ids
    return model.codec.decode(ids)


def assert_obeys(constraint: Constraint, content: str) -> None:
    match constraint.kind:
        case "json_schema":
            value = json.loads(content)
            assert list(value) == ["name", "count", "kinds"]
            assert len(value["name"]) <= 5
            assert 10 <= value["count"] <= 99
            assert set(value["kinds"]) <= {"a", "b"}
        case "regex":
            assert re.fullmatch(constraint.texts[0], content)
        case "lark":
            assert "+" in content
            assert set(content) <= set("0123456789+()")
        case "choice":
            assert content in constraint.texts


@pytest.mark.parametrize(("constraint", "sampling"), diagonal(KINDS, range(len(SAMPLINGS))))
def test_a_row_obeys_its_constraint_and_ends_by_itself(
    trained: LoadedModel, constraint: Constraint, sampling: int
) -> None:
    one = row(trained, constraint, SAMPLINGS[sampling])
    run_together(trained, [one])
    assert_obeys(constraint, text(trained, one))
    assert one.matcher
    assert one.matcher.is_satisfied


_ALONE: list[list[int]] = []


def _drawn_alone(
    model: LoadedModel, pairs: Sequence[tuple[Constraint, Sampling]]
) -> list[list[int]]:
    """Return the tokens of each row alone, with the usual limit of a vocabulary, memoized."""
    if not _ALONE:
        for constraint, sampling in pairs:
            own = row(model, constraint, sampling)
            run_together(model, [own])
            _ALONE.append(own.ids)
    return _ALONE


@pytest.mark.parametrize("large", [0, 1 << 20])
def test_rows_of_all_kinds_in_one_batch_draw_what_they_draw_alone(
    trained: LoadedModel, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare with vocabularies that are large, and that are not."""
    pairs = [(constraint, sampling) for constraint in KINDS for sampling in SAMPLINGS]
    random.Random(5).shuffle(pairs)  # noqa: S311 - reproducible
    pairs = pairs[:12]
    alone = _drawn_alone(trained, pairs)
    monkeypatch.setattr(constrained, "_LARGE_VOCABULARY", large)
    together = [row(trained, *pair, late=3 * number // 2) for number, pair in enumerate(pairs)]
    free = [Row(PROMPT, 30, each, late=number) for number, each in enumerate(SAMPLINGS[:3])]
    run_together(trained, [*together[:6], *free, *together[6:]])
    assert [own.ids for own in together] == alone
    for own in free:
        assert own.ids == run_alone(trained, own)


def test_a_preempted_row_continues_where_it_was(trained: LoadedModel) -> None:
    alone = row(trained, RECORD, SAMPLINGS[1])
    run_together(trained, [alone])
    ends = trained.info.eos_token_ids
    for steps in (1, 2, 3, 6):
        batch = LocalBatch.of(trained)
        batch.add(0, PROMPT, SAMPLINGS[1], matcher=matcher(trained, RECORD))
        batch.add(1, PROMPT, GREEDY)
        drawn: dict[int, list[int]] = {0: [], 1: []}

        def step(batch: LocalBatch = batch, drawn: dict[int, list[int]] = drawn) -> None:
            for event in batch.step():
                if token := getattr(event, "token_id", None):
                    drawn[event.row].append(token)

        while len(drawn[0]) < steps:
            step()
        batch.preempt(0)
        for _ in range(3):
            step()
        batch.resume(0)
        while not (drawn[0] and drawn[0][-1] in ends):
            step()
        batch.close()
        assert drawn[0] == alone.ids


def test_a_constraint_on_one_model_with_a_random_vocabulary_of_bytes(tiny: LoadedModel) -> None:
    """Ids beyond the tokenizer must never be drawn, and random weights favour none."""
    assert tiny.info.vocab_size == VOCAB_SIZE
    for seed in range(4):
        one = row(tiny, RECORD, Sampling(seed=seed, temperature=2.0, top_k=0, top_p=1.0))
        run_together(tiny, [one])
        assert_obeys(RECORD, text(tiny, one))


def test_ids_beyond_the_tokenizer_are_masked(
    load: Callable[..., LoadedModel], model_dir: Callable[..., Path]
) -> None:
    model = load(model_dir(vocab_size=VOCAB_SIZE + 500))
    free = Row(PROMPT, 60, Sampling(seed=0, temperature=3.0, top_k=0, top_p=1.0))
    run_together(model, [free])
    assert max(free.ids) >= VOCAB_SIZE, "without a constraint such ids are drawn"
    one = row(model, Constraint("regex", ("(.|\n){50}",)), free.sampling)
    run_together(model, [one])
    assert len(text(model, one)) == 50


def test_log_probabilities_are_those_of_the_model(trained: LoadedModel) -> None:
    one = row(trained, ANSWER, replace(GREEDY, logprobs=5))
    run_together(trained, [one])
    free = Row([*PROMPT, *one.ids[:-1]], 1, replace(GREEDY, logprobs=5))
    run_together(trained, [free])
    assert dict(one.logprobs[-1].top) == pytest.approx(dict(free.logprobs[0].top), abs=2e-3)
    assert one.ids[0] not in [id_ for id_, _ in one.logprobs[0].top]
    assert one.logprobs[0].logprob < one.logprobs[0].top[-1][1]


def test_a_bias_counts_among_the_legal_tokens(trained: LoadedModel) -> None:
    texts = set()
    for biased in ("yes", "no"):
        (id_, *_) = trained.codec.encode(biased, as_prompt=False)
        one = row(trained, ANSWER, replace(GREEDY, logit_bias=((id_, 100.0),)))
        run_together(trained, [one])
        texts.add(text(trained, one)[:1])
    assert texts == {"y", "n"}
    (id_, *_) = trained.codec.encode("+", as_prompt=False)
    one = row(trained, ANSWER, replace(GREEDY, logit_bias=((id_, 100.0),)))
    run_together(trained, [one])
    assert_obeys(ANSWER, text(trained, one))


def test_a_row_without_a_legal_token_ends_alone(trained: LoadedModel) -> None:
    stuck = matcher(trained, Constraint("lark", ('start: "a" b\nb: /[^\\s\\S]/',)))
    batch = LocalBatch.of(trained)
    batch.add(0, PROMPT, GREEDY, matcher=stuck)
    batch.add(1, PROMPT, SAMPLINGS[1], matcher=matcher(trained, WORDS))
    batch.add(2, PROMPT, GREEDY)
    failures = [
        event for _ in range(6) for event in batch.step() if isinstance(event, NoLegalToken)
    ]
    assert {event.row for event in failures} == {0}
    assert failures[0].reason
    batch.close()


def test_whitespace_is_bounded(tiny: LoadedModel) -> None:
    """With a bias for white space, every gap is filled, and the text still ends."""
    blank = [id_ for id_ in range(VOCAB_SIZE) if (tiny.codec.token_bytes(id_) or b"x").isspace()]
    bias = tuple((id_, 100.0) for id_ in blank)
    for constraint in (RECORD, Constraint("json_schema", ('{"type": "array", "maxItems": 3}',))):
        one = row(tiny, constraint, Sampling(seed=1, logit_bias=bias))
        one.count = 1200
        run_together(tiny, [one])
        gaps = re.findall(r"[ \t\r\n]+", text(tiny, one))
        assert max(map(len, gaps)) >= 15
        assert max(map(len, gaps)) <= 23


@pytest.mark.parametrize("how", ["remove", "close", "preempt and remove"])
def test_a_removed_row_leaves_no_matcher(trained: LoadedModel, how: str) -> None:
    batch = LocalBatch.of(trained)
    made = [matcher(trained, RECORD) for _ in range(3)]
    left = [weakref.ref(each) for each in made]
    for number in range(3):
        batch.add(number, PROMPT, SAMPLINGS[1], matcher=made.pop())
    for _ in range(5):
        batch.step()
    if how == "preempt and remove":
        batch.preempt(0)
    if how == "close":
        batch.close()
    else:
        batch.remove([0, 1, 2])
    gc.collect()
    assert [each() for each in left] == [None] * 3
