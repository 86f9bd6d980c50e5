"""A lower bound of a text's tokens, computed from its beginning, is never too high."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner_server.mlx_backend.tokenizer import codec as codec_module

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
pytestmark = pytest.mark.mlx

DEMO = Path(__file__).parents[2] / "runner_server/demo/model"
PART_CHARS = 1024


@pytest.fixture(scope="module")
def codec() -> codec_module.FastCodec:
    """The tokenizer of the demo model."""
    if not (DEMO / "tokenizer.json").is_file():
        pytest.skip("the demo model is not in this checkout")
    config = json.loads((DEMO / "config.json").read_text())
    return codec_module.load_codec(DEMO, config)[0]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrink the parts, so a text of a few thousand characters is a very long one."""
    monkeypatch.setattr(codec_module, "_PART_CHARS", PART_CHARS)


units = st.text(min_size=1, max_size=12) | st.sampled_from(["a", " ", "\n    ", "def f(", "😀"])


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    parts=st.lists(st.tuples(units, st.integers(1, 2000)), min_size=1, max_size=4),
    enough=st.integers(1, 800),
)
def test_the_bound_never_exceeds_the_token_count(
    codec: codec_module.FastCodec, parts: list[tuple[str, int]], enough: int
) -> None:
    text = "".join(unit * count for unit, count in parts)[:12_000]
    tokens = len(codec.encode(text, as_prompt=True))
    fewest = codec.fewest_tokens(text, enough)
    assert fewest <= tokens
    # A bound of 0 means that the tokenized beginnings were not long enough.
    if not fewest:
        half = codec.encode(text[: len(text) // 2], as_prompt=False)
        assert len(text) <= PART_CHARS or len(half) <= 4 * enough + PART_CHARS


@pytest.mark.parametrize("unit", ["x", " ", "😀", "def f(x):\n", "<|end|>"])
def test_only_the_beginning_is_tokenized(
    codec: codec_module.FastCodec, monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    seen: list[int] = []
    encode = codec.encode

    def counting(text: str, *, as_prompt: bool, literal: bool) -> list[int]:
        seen.append(len(text))
        return encode(text, as_prompt=as_prompt, literal=literal)

    monkeypatch.setattr(codec, "encode", counting)
    assert codec.fewest_tokens(unit * 1_000_000, 20) > 20
    assert sum(seen) <= 2 * PART_CHARS


def test_special_tokens_that_are_text_count_as_their_parts(codec: codec_module.FastCodec) -> None:
    text = "<|end|>" * PART_CHARS
    few, many = (codec.fewest_tokens(text, 20, literal=literal) for literal in (False, True))
    assert few > 20
    assert many > 2 * few


def test_a_text_that_may_fit_has_no_bound(codec: codec_module.FastCodec) -> None:
    assert codec.fewest_tokens("x" * PART_CHARS, 1) == 0
    assert codec.fewest_tokens("x" * 3 * PART_CHARS, 10_000) == 0
