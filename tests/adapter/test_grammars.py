"""Compilation of constraints for many tokenizers: refusals, the cache, and its bounds."""

from __future__ import annotations

import gc
import importlib.util
import json
import random
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner_server.engine.types import Constraint
from runner_server.errors import InvalidField
from runner_server.mlx_backend.constraints import grammars as module
from runner_server.mlx_backend.constraints.grammars import GrammarCache
from runner_server.mlx_backend.tokenizer.codec import FastCodec
from support.tokenizer_files import byte_level, gemma, llama2, qwen

KINDS: dict[str, Callable[[], Any]] = {
    "byte level": byte_level,
    "qwen": qwen,
    "gemma": gemma,
    "llama2": llama2,
}
END = 3
SCHEMA = Constraint(
    "json_schema", ('{"type": "array", "items": {"enum": ["é", "日本", 1]}, "maxItems": 3}',)
)
PLAIN = Constraint("regex", ("[a-c]{3}",))

BAD: list[tuple[Constraint, str, str]] = [
    (Constraint("json_schema", ("{",)), "constraint.json_schema", "line 1, column 2"),
    (Constraint("json_schema", ("[1]",)), "constraint.json_schema", "object or boolean"),
    (Constraint("json_schema", ("NaN",)), "constraint.json_schema", "not JSON"),
    (Constraint("json_schema", ("false",)), "constraint.json_schema", "schema is false"),
    (Constraint("json_schema", ("[" * 30_000,)), "constraint.json_schema", "100 levels"),
    (
        Constraint("json_schema", ('{"not": ' * 101 + "{}" + "}" * 101,)),
        "constraint.json_schema",
        "100 levels",
    ),
    (Constraint("json_schema", ('{"enum": ["\\ud800"]}',)), "constraint.json_schema", "hex"),
    (Constraint("json_schema", ('{"maxLength": 1e999}',)), "constraint.json_schema", "not JSON"),
    (
        Constraint("json_schema", ('{"x-guidance": {"lenient": true}, "not": {}}',)),
        "constraint.json_schema",
        "at #/x-guidance",
    ),
    (Constraint("json_schema", ('{"$ref": "#"}',)), "constraint.json_schema", "no text"),
    (Constraint("regex", ("ab(c",)), "constraint.regex", "unclosed group at character 3"),
    (Constraint("regex", ("a(?=b)",)), "constraint.regex", "look-around"),
    (Constraint("regex", (r"(a)\1",)), "constraint.regex", "backreferences"),
    (Constraint("regex", (r"[^\s\S]",)), "constraint.regex", "no text"),
    (Constraint("lark", ("start: foo",)), "constraint.lark", "line 1, column 8"),
    (Constraint("lark", ('start: "a"\nb: /x',)), "constraint.lark", "at line"),
    (Constraint("lark", ('begin: "a"',)), "constraint.lark", "no start rule"),
    (Constraint("lark", ('start: a\na[stop="b"]: /c*/',)), "constraint.lark", "line 2: the attr"),
    (Constraint("lark", ("start: <|nope|>",)), "constraint.lark", "unknown special token"),
    (Constraint("lark", ('start: %json {"not": {}}',)), "constraint.lark", "Unimplemented"),
]

PRODUCT = {"allOf": [{"anyOf": [{"minimum": i + j} for i in range(9)]} for j in range(6)]}
"""Half a million intersections."""

HOSTILE: list[Constraint] = [
    Constraint("regex", ("(a{1,1000}){1,1000}" * 20,)),
    Constraint("regex", ("|".join(f"(.*{c}.{{200}})" for c in "abcdefghijklmnop"),)),
    Constraint("regex", ("(" * 20_000 + ")" * 20_000,)),
    Constraint("regex", ("((((a|b)*c)*d)*e){5000}",)),
    Constraint("lark", ("start: a\n" + "\n".join(f'a: a a a | "{i}"' for i in range(2)),)),
    Constraint("lark", ("start: " + "(" * 5000 + '"a"' + ")" * 5000,)),
    Constraint(
        "lark",
        (
            "start: a0\n"
            + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(60))
            + '\na60: "x" |',
        ),
    ),
    Constraint("json_schema", (json.dumps({"enum": [f"{i:x}" for i in range(9000)]}),)),
    Constraint(
        "json_schema",
        (
            json.dumps(
                {"allOf": [{"anyOf": [{"minimum": i + j} for i in range(9)]} for j in range(6)]}
            ),
        ),
    ),
    Constraint(
        "json_schema",
        (json.dumps({"properties": {f"p{i}": {"type": "null"} for i in range(2000)}}),),
    ),
    Constraint("json_schema", (json.dumps({"type": "string", "pattern": "(x+x+)+y" * 500}),)),
    Constraint("choice", tuple("x" * i for i in range(1, 350))),
]


@pytest.fixture(scope="module")
def cache() -> GrammarCache:
    return cache_of(byte_level())


def cache_of(tokenizer: Any, ends: tuple[int, ...] = (END,), extra: int = 0) -> GrammarCache:
    codec = FastCodec(tokenizer, [], None)
    return GrammarCache(codec, codec.vocab_size + extra, ends)


def write(cache: GrammarCache, constraint: Constraint, seed: int) -> str:
    """Return a random text within a constraint."""
    draw = random.Random(seed)  # noqa: S311 - reproducible
    matcher: Any = cache.compile(constraint).result().start()
    ids: list[int] = []
    while True:
        mask = int.from_bytes(matcher.inner.compute_bitmask(), "little")
        legal = [id_ for id_ in range(mask.bit_length()) if mask >> id_ & 1]
        ids.append(draw.choice(legal))
        matcher.consume(ids[-1])
        assert not matcher.failure
        if ids[-1] == END:
            assert matcher.is_satisfied
            return cache._codec.decode([0, *ids[:-1]]).removeprefix(cache._codec.decode([0]))


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_of_each_kind_write_what_the_grammar_says(kind: str) -> None:
    cache = cache_of(KINDS[kind](), extra=70)
    for seed in range(10):
        text = write(cache, SCHEMA, seed)
        assert set(json.loads(text)) <= {"é", "日本", 1}
        assert len(write(cache, PLAIN, seed)) == 3


@pytest.mark.parametrize(("constraint", "field", "part"), BAD, ids=lambda each: str(each)[:60])
def test_a_constraint_that_cannot_be_used_is_refused_with_the_place(
    cache: GrammarCache, constraint: Constraint, field: str, part: str
) -> None:
    with pytest.raises(InvalidField) as caught:
        cache.compile(constraint).result()
    ((named, text),) = caught.value.violations
    assert named == field
    assert part in text
    assert len(text) < 400
    assert "llguidance {" not in text


@pytest.mark.parametrize(
    "constraint", HOSTILE, ids=lambda each: f"{each.kind} {each.texts[0][:30]}"
)
def test_a_hostile_constraint_costs_a_bounded_time(
    cache: GrammarCache, constraint: Constraint
) -> None:
    """Refuse it, or bound the cost of each step; the test's own time limit judges."""
    future = cache.compile(constraint)
    if refusal := future.exception():
        assert isinstance(refusal, InvalidField)
        assert refusal.violations[0][0] == f"constraint.{constraint.kind}"
        return
    draw = random.Random(1)  # noqa: S311 - reproducible
    matcher: Any = future.result().start()
    for _ in range(300):
        mask = int.from_bytes(matcher.inner.compute_bitmask(), "little")
        if matcher.failure:
            return
        legal = [id_ for id_ in range(mask.bit_length()) if mask >> id_ & 1]
        matcher.consume(draw.choice(legal))
        if matcher.inner.is_stopped():
            return


def test_a_lark_grammar_keeps_its_own_lines_and_comments(cache: GrammarCache) -> None:
    text = 'start: "a" b // comment\nb: "[stop=]" | /[temperature=]{2}/ // the end'
    assert write(cache, Constraint("lark", (text,)), 1)[0] == "a"


@pytest.mark.parametrize(
    "texts", [("a",), ("a", "ab", "b"), ('"', "\\", "/", "\n\t\x01"), ("日本", "é😀")]
)
def test_a_choice_is_taken_literally(cache: GrammarCache, texts: tuple[str, ...]) -> None:
    assert {write(cache, Constraint("choice", texts), seed) for seed in range(40)} == {*texts}


def test_another_text_can_be_judged(cache: GrammarCache) -> None:
    matcher = cache.compile(PLAIN).result().start()
    assert not matcher.is_satisfied
    judged = {text: matcher.accepts(text) for text in ("", "ab", "abc", "abcd", "abd", "日")}
    assert [text for text, accepted in judged.items() if accepted] == ["abc"]


def test_an_equal_constraint_is_compiled_once(cache: GrammarCache) -> None:
    first = cache.compile(Constraint("choice", ("once",)))
    assert cache.compile(Constraint("choice", ("once",))) is first
    assert cache.compile(Constraint("choice", ("twice",))) is not first


def test_a_failure_is_not_cached(cache: GrammarCache) -> None:
    bad = Constraint("regex", ("(",))
    first = cache.compile(bad)
    assert first.exception()
    done = threading.Event()
    first.add_done_callback(lambda _: done.set())
    assert done.wait(10)
    assert cache.compile(bad) is not first


def test_the_cache_is_bounded() -> None:
    cache = cache_of(byte_level())
    first = weakref.ref(cache.compile(Constraint("choice", ("0",))).result())
    for number in range(1, 100):
        cache.compile(Constraint("choice", (f"{number}",))).result()
    assert len(cache._cached) == module._MAX_CACHED
    for number in range(40):
        cache.compile(Constraint("choice", ("x" * 60_000, f"{number}"))).result()
    assert sum(len(text) for each in cache._cached for text in each.texts) <= 1 << 20
    gc.collect()
    assert first() is None


def test_without_llguidance_the_answer_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    cache = cache_of(byte_level())
    with pytest.raises(InvalidField, match=r"pip install '\.\[server\]'") as caught:
        cache.compile(PLAIN).result()
    assert caught.value.violations[0][0] == "constraint"


def test_a_tokenizer_whose_tokens_depend_on_each_other_is_refused() -> None:
    from tokenizers import decoders

    tokenizer = byte_level()
    tokenizer.decoder = decoders.WordPiece()
    cache = cache_of(tokenizer)
    assert "tokenizer" in cache.problem
    with pytest.raises(InvalidField, match="tokenizer"):
        cache.compile(PLAIN).result()


def test_a_model_that_cannot_end_a_text_is_refused() -> None:
    codec = FastCodec(byte_level(), [], None)
    cache = GrammarCache(codec, codec.vocab_size, (codec.vocab_size,))
    with pytest.raises(InvalidField, match="ends a text"):
        cache.compile(PLAIN).result()


def test_capabilities_follow(
    load: Any, model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(model_dir()).info.takes_constraints
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llguidance" else find(name)
    )
    assert not load(model_dir()).info.takes_constraints
