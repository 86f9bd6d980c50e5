"""JSON schemas of many kinds, judged by the ``jsonschema`` package."""

from __future__ import annotations

import json

import jsonschema
import pytest

from runner_server.engine.backend import LoadedModel, Matcher
from runner_server.engine.types import Constraint, Sampling
from runner_server.errors import InvalidField
from support.rows import Row, run_together
from support.schemas import UNSUPPORTED, Schema, schemas, wrapped
from support.sweeps import sampled

COUNT, ROWS = 200, 25
MAX_TOKENS = 160
PROMPT = list(b"data = ")
SAMPLINGS = (Sampling(temperature=0), Sampling(), Sampling(top_k=0, top_p=1.0), Sampling(top_k=0))


def _matcher(model: LoadedModel, schema: Schema) -> Matcher:
    constraint = Constraint("json_schema", (json.dumps(schema),))
    return model.grammars.compile(constraint).result(timeout=60).start()


def _row(model: LoadedModel, schema: Schema, number: int) -> Row:
    sampling = SAMPLINGS[number % len(SAMPLINGS)]
    seeded = Sampling(sampling.temperature, sampling.top_p, top_k=sampling.top_k, seed=number)
    ends = model.info.eos_token_ids
    return Row(PROMPT, MAX_TOKENS, seeded, number // 2, _matcher(model, schema), ends)


def _is_valid(schema: Schema, text: str) -> bool:
    kind = jsonschema.Draft202012Validator
    kind.check_schema(schema)
    try:
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("start", sampled(range(0, COUNT, ROWS), range(0, COUNT, 3 * ROWS)))
def test_every_text_is_valid_and_equals_the_one_drawn_alone(
    trained: LoadedModel, start: int
) -> None:
    corpus = list(schemas(start + ROWS))[start:]
    rows = [_row(trained, schema, start + i) for i, schema in enumerate(corpus)]
    run_together(trained, rows)
    finished = 0
    for schema, row in zip(corpus, rows, strict=True):
        is_whole = row.ids[-1] in trained.info.eos_token_ids
        text = trained.codec.decode(row.ids[:-1] if is_whole else row.ids)
        finished += is_whole
        assert row.matcher
        assert row.matcher.is_satisfied == _is_valid(schema, text), (schema, text)
        assert row.matcher.is_satisfied or not is_whole
    alone = _row(trained, corpus[0], start)
    run_together(trained, [alone])
    assert alone.ids == rows[0].ids
    assert finished > 0.6 * ROWS


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_an_unsupported_schema_is_refused_with_its_place(tiny: LoadedModel, reason: str) -> None:
    for schema, place in wrapped(UNSUPPORTED[reason]):
        with pytest.raises(InvalidField) as caught:
            _matcher(tiny, schema)
        ((field, text),) = caught.value.violations
        assert field == "constraint.json_schema"
        assert text.startswith(f"at {place}: ")
        assert reason in text
