"""Quantized keys and values: the same text alone, in a batch, and with a prefix cache."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from runner_server.engine.backend import LoadedModel
from runner_server.engine.prefix_disk import BLOCK_TOKENS
from runner_server.engine.types import Dtype, Sampling
from runner_server.errors import InvalidField, RunnerFault
from support.embedding_models import say_that_it_embeds
from support.prefix_bench import Bench, random_prompt
from support.rows import GREEDY, Row, run_alone, run_together
from support.sweeps import diagonal, sampled
from tools.local_batch import decode_with_drafts, start_alone
from tools.memory.models import scaled, write_model

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from mlx_lm.generate import generate_step  # noqa: E402
from mlx_lm.models import base  # noqa: E402

from runner_server.mlx_backend.cache.blocks import BlockCodec  # noqa: E402
from runner_server.mlx_backend.cache.quantized import quantized  # noqa: E402
from runner_server.mlx_backend.cache.row_caches import CachePieces, merge, view  # noqa: E402
from runner_server.mlx_backend.model.kv_bits import attention  # noqa: E402
from runner_server.mlx_backend.upstream.names import QuantizedKVCache  # noqa: E402

DEMO = Path(__file__).parents[2] / "runner_server/demo/model"
SAMPLED = Sampling(seed=5, temperature=0.9, top_k=50)
TEXTS = (
    "def main():\n",
    "import os\nimport sys\n\ndef parse(arguments):\n",
    "class Reader:\n    def __init__(self, file):\n" * 12,
    "x",
)


@pytest.fixture(scope="module", params=[8, 4])
def demo_in_bits(request: pytest.FixtureRequest, load: Callable[..., LoadedModel]) -> LoadedModel:
    """The demo model with 8 and with 4 bits."""
    if not (DEMO / "model.safetensors").is_file():
        pytest.skip("the demo model is not in this checkout")
    return load(DEMO, parallel=8, kv_bits=request.param, context_length=1024)


def _prompts(model: LoadedModel) -> list[list[int]]:
    return [model.codec.encode(text, as_prompt=True) for text in TEXTS]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_rows_of_any_length_have_the_text_they_have_alone(
    demo_in_bits: LoadedModel, sampling: Sampling
) -> None:
    prompts = _prompts(demo_in_bits)
    alone = [run_alone(demo_in_bits, Row(prompt, 40, sampling)) for prompt in prompts]
    rows = [Row(prompt, 40, sampling, late=3 * i) for i, prompt in enumerate(prompts)]
    assert run_together(demo_in_bits, rows) == alone
    assert demo_in_bits.info.parallel == 8


def test_a_lone_row_has_the_tokens_of_mlx_lm(
    demo_in_bits: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With mlx_lm's own attention, and caches that are quantized from the first token on."""
    prompt = _prompts(demo_in_bits)[2]
    ours = run_alone(demo_in_bits, Row(prompt, 40))
    spec = importlib.util.spec_from_file_location("own_base", str(base.__file__))
    assert spec
    assert spec.loader
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    name = "quantized_scaled_dot_product_attention"
    monkeypatch.setattr(base, name, getattr(own, name))
    model: Any = demo_in_bits
    caches = [QuantizedKVCache(32, demo_in_bits.info.kv_bits) for _ in model._pieces.new()]
    steps = generate_step(mx.array(prompt), model._model, max_tokens=40, prompt_cache=caches)
    assert [int(token) for token, _ in steps] == ours


def test_the_prefix_cache_and_preemption_leave_the_text_as_it_is(demo_in_bits: LoadedModel) -> None:
    prompt = _prompts(demo_in_bits)[2]
    expected = run_alone(demo_in_bits, Row(prompt, 30, SAMPLED))
    bench = Bench(demo_in_bits)
    bench.run(prompt[:150], 20)
    again = bench.run(prompt, 30, SAMPLED)
    assert again.cached >= 149
    assert again.ids == expected
    row = bench.add(90, prompt, SAMPLED)
    bench.add(91, prompt[:9], SAMPLED)
    while len(row.ids) < 10:
        bench.step()
    bench.batch.preempt(90)
    bench.step()
    bench.batch.resume(90)
    while len(row.ids) < 30:
        bench.step()
    assert row.ids[:30] == expected
    bench.batch.remove([90, 91])


def test_a_prefix_takes_the_memory_of_its_bits(demo_in_bits: LoadedModel) -> None:
    bench = Bench(demo_in_bits)
    bench.run(random_prompt(256, 1), 1)
    numbers = 4 * 2 * 2 * 32
    token_bytes = numbers * demo_in_bits.info.kv_bits // 8 + 2 * 4 * numbers // 32
    assert bench.cache.nbytes // token_bytes == pytest.approx(256, abs=2)
    assert demo_in_bits.kv_bytes(256) == 256 * token_bytes


def test_drafts_leave_the_text_as_it_is(demo_in_bits: LoadedModel) -> None:
    prompt = _prompts(demo_in_bits)[2]
    expected = run_alone(demo_in_bits, Row(prompt, 40))

    def draft(done: int) -> Sequence[int]:
        right = expected[done : done + 9]
        return [*right[:3], 7, *right[4:]] if done % 2 else right

    tokens, drafted = decode_with_drafts(start_alone(demo_in_bits, prompt, GREEDY), 40, draft)
    assert drafted > 40
    assert [token.token_id for token in tokens] == expected


def test_blocks_of_the_disk_hold_the_quantized_numbers(demo_in_bits: LoadedModel) -> None:
    model: Any = demo_in_bits
    pieces = CachePieces.of(model._model)
    codec = BlockCodec(model._model, pieces)
    caches = pieces.new()
    model._model(mx.array([random_prompt(BLOCK_TOKENS, 1)]), cache=caches)
    segment = pieces.segment(caches, 0, BLOCK_TOKENS)
    payload = codec.encode([segment])
    assert payload is not None
    assert len(payload) == codec.block_bytes == demo_in_bits.kv_bytes(256) * BLOCK_TOKENS // 256
    assert f"2x{demo_in_bits.info.kv_bits}:mlx.core.uint32" in codec.layout
    for parts, expected in zip(codec.decode(bytearray(payload)), segment, strict=True):
        assert parts
        assert expected
        assert all(mx.array_equal(*pair).item() for pair in zip(parts, expected, strict=True))


@pytest.mark.parametrize(
    ("kind", "kv_heads", "count"),
    diagonal(["none", "causal", "rows", "heads", "added"], [4, 2], [1, 3, 9]),
)
def test_attention_is_that_to_the_dequantized_numbers(kv_heads: int, count: int, kind: str) -> None:
    rows, heads, tokens, size = 2, 4, 40, 64
    queries = mx.random.normal((rows, heads, count, size), key=mx.random.key(1))
    keys, values = (
        mx.random.normal((rows, kv_heads, tokens, size), key=mx.random.key(k)) for k in (2, 3)
    )
    is_seen = mx.arange(tokens) >= mx.array([0, 7])[:, None, None, None]
    masks = {
        "none": None,
        "causal": "causal",
        "rows": mx.broadcast_to(is_seen, (rows, 1, count, tokens)),
        "heads": mx.broadcast_to(is_seen, (rows, heads, count, tokens)),
        "added": mx.random.normal((count, tokens), key=mx.random.key(4)),
    }
    parts = quantized(keys, values, 32, 4)
    plain = [mx.dequantize(*three, 32, 4) for three in (parts[:3], parts[3:])]
    before = mx.array(queries)
    found = attention(queries, parts[:3], parts[3:], 0.125, masks[kind], 32, 4)
    expected = mx.fast.scaled_dot_product_attention(queries, *plain, scale=0.125, mask=masks[kind])
    assert mx.allclose(found, expected, atol=2e-6)
    assert mx.array_equal(queries, before)


def test_a_number_that_is_not_finite_stays_so() -> None:
    """MLX would quantize NaN to a number, and so answer with a text of NaN."""
    for bad in (mx.nan, mx.inf, -mx.inf):
        keys = mx.ones((1, 2, 3, 64))
        keys[0, 1, 2, 5] = bad
        codes, scales, biases = quantized(keys, mx.ones((1, 2, 3, 64)), 32, 8)[:3]
        again = mx.dequantize(codes, scales, biases, 32, 8)
        are_finite = mx.isfinite(again).all(axis=-1)
        assert are_finite.tolist() == [[[True] * 3, [True, True, False]]]
        assert mx.isfinite(again[0, 1, 2]).tolist() == [False] * 32 + [True] * 32


@pytest.mark.parametrize("bits", sampled([8, 4], [4]))
@pytest.mark.parametrize("kind", ["qwen3_moe", "gemma3_text", "qwen3_next"])
def test_other_models_decode_rows_together(
    load: Callable[..., LoadedModel], tmp_path: Path, kind: str, bits: int
) -> None:
    """Experts; sliding windows and recurrent states, which stay as they are."""
    write_model(tmp_path, scaled(kind))
    model: Any = load(tmp_path, parallel=4, dtype=Dtype.AS_STORED, kv_bits=bits, context_length=512)
    assert model.info.parallel == 4
    prompts = [random_prompt(length, length) for length in (150, 3, 40)]
    caches = [model._pieces.new() for _ in prompts]
    for own, prompt in zip(caches, prompts, strict=True):
        model._model(mx.array([[token % 200 for token in prompt]]), cache=own)
    batch = merge(caches, 4)
    together = model._model(mx.array([[5], [6], [7]]), cache=batch)[:, -1]
    for slot, own in enumerate(caches):
        alone = model._model(mx.array([[5 + slot]]), cache=own)[0, -1]
        assert mx.allclose(together[slot], alone, atol=0.02)
        assert [type(each) for each in view(batch, slot)] == [type(each) for each in own]


def test_texts_to_embed_do_not_share_a_call(
    load: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    """Without caches, which such a call does not need, keys and values would not be quantized."""
    path = say_that_it_embeds(Path(shutil.copytree(DEMO, tmp_path / "demo")))
    plain, quantized = (load(path, kv_bits=bits).prefill_limits.max_texts(9) for bits in (0, 8))
    assert plain > 1
    assert quantized == 1


REFUSED = {
    "deepseek_v3": "its attention does not take quantized keys",
    "gemma2": "its attention does not take quantized keys",
    "gpt_oss": "does not support attention sinks",
    "phi3small": "its heads have 16 numbers, which is not a multiple of 32",
    "mamba2": "its caches are of kind ArraysCache",
    "falcon_h1": "its caches are of kind CacheList",
}


@pytest.mark.parametrize("kind", sampled(REFUSED, ["deepseek_v3", "phi3small", "mamba2"]))
def test_a_model_that_cannot_be_quantized_is_refused_by_name(
    load: Callable[..., LoadedModel], tmp_path: Path, kind: str
) -> None:
    write_model(tmp_path, scaled(kind))
    with pytest.raises(RunnerFault, match=REFUSED[kind]) as caught:
        load(tmp_path, allow_inexact=True, kv_bits=4)
    assert isinstance(caught.value, InvalidField)
    ((field, text),) = caught.value.violations
    assert field == "kv_bits"
    assert text.startswith(f"the keys and values of a '{kind}' model cannot be quantized: ")


def test_a_model_that_computes_something_else_with_quantized_keys_is_refused(
    load: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ignores_scale(*args: Any, **options: Any) -> Any:
        return attention(*args, **{**options, "scale": 1.0})

    path = "runner_server.mlx_backend.model.kv_bits.attention"
    with monkeypatch.context() as patch:
        patch.setattr(path, ignores_scale)
        with pytest.raises(InvalidField, match="logits differ from those with the same numbers"):
            load(DEMO, kv_bits=8)
    assert load(DEMO, kv_bits=8).info.kv_bits == 8
