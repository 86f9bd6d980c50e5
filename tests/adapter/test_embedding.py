"""Vectors of texts, against hidden states that mlx_lm computes in one call and numpy pools."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from runner_server.engine.backend import LoadedModel
from runner_server.engine.embedding.types import Embedded
from runner_server.engine.types import Event, NotFinite, Token
from runner_server.engine.work import EmbedItem, TextChunk
from runner_server.errors import ModelUnsupported
from support.embedding_models import say_that_it_embeds
from support.models import VOCAB_SIZE, build_model
from support.rows import GREEDY
from support.sweeps import diagonal, sampled
from tools.local_batch import LocalBatch

from .conftest import Load

Vector = npt.NDArray[np.float64]

ROUNDING = 2e-6
"""Largest difference between two numbers of vectors of length 1 that are computed in another order,
in float32 on a CPU: 9e-8 was measured (OpenBLAS, AMD EPYC)."""

LENGTHS = (1, 2, 3, 31, 127, 128, 129, 300)
"""Numbers of tokens below, at and above the chunk of 128."""

MODES = ("cls", "lasttoken", "mean", "mean_sqrt_len_tokens", "weightedmean")


def _texts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = np.random.default_rng(7)
    return [[int(id_) for id_ in generator.integers(0, VOCAB_SIZE, n)] for n in lengths]


def _states(path: Path, ids: Sequence[int]) -> Vector:
    """Return the hidden states of a text from mlx_lm's model, in one call without caches."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(path)
    states: Vector = np.array(model.model(mx.array([list(ids)])), dtype=np.float64)
    return states.reshape(len(ids), -1)


def _pooled(states: Vector, mode: str) -> Vector:
    count = len(states)
    positions = np.arange(count)
    weights = {
        "cls": positions == 0,
        "lasttoken": positions == count - 1,
        "mean": np.ones(count) / count,
        "mean_sqrt_len_tokens": np.ones(count) / math.sqrt(count),
        "weightedmean": (positions + 1) / (positions + 1).sum(),
    }
    pooled: Vector = np.einsum("t,ts->s", weights[mode], states)
    return pooled


def _normalized(vector: Vector) -> Vector:
    length: float = np.linalg.norm(vector).item()
    return vector / length


def embed(model: LoadedModel, texts: Sequence[Sequence[int]]) -> list[Vector]:
    """Return the vectors of the texts of one request."""
    batch = LocalBatch.of(model)
    batch.add_texts(0, texts)
    found: dict[int, Vector] = {}
    try:
        while len(found) < len(texts):
            for event in batch.step():
                if isinstance(event, Embedded):
                    found[event.text] = np.array(event.vector, dtype=np.float64)
                assert not isinstance(event, NotFinite)
    finally:
        batch.close()
    return [found[text] for text in range(len(texts))]


def largest_difference(one: Sequence[Vector], other: Sequence[Vector]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in the shape of Qwen3-Embedding."""
    return say_that_it_embeds(build_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3"))


@pytest.fixture(scope="module")
def model(load: Load, path: Path) -> LoadedModel:
    return load(path, context_length=512)


def _as_base_model(path: Path, new: Path, **config: Any) -> Path:
    """Copy a model as transformers saves a base model: without head and prefix."""
    import mlx.core as mx

    new.mkdir()
    for file in path.glob("*.json"):
        (new / file.name).write_bytes(file.read_bytes())
    values = json.loads((path / "config.json").read_text()) | config
    (new / "config.json").write_text(json.dumps(values))
    weights: Any = mx.load(str(path / "model.safetensors"))
    named = {name.removeprefix("model."): weights[name] for name in weights if "head" not in name}
    mx.save_safetensors(str(new / "model.safetensors"), named)
    return say_that_it_embeds(new)


# -- the vectors -----------------------------------------------------------------


def test_the_vectors_are_the_pooled_states_of_whole_texts(model: LoadedModel, path: Path) -> None:
    texts = _texts()
    expected = [_normalized(_states(path, text)[-1]) for text in texts]
    assert largest_difference(embed(model, texts), expected) < ROUNDING


@pytest.mark.parametrize(
    ("mode", "normalizes"), diagonal([*MODES, "lasttoken+mean"], [True, False])
)
def test_every_mode_is_that_of_its_definition(
    load: Load, path: Path, tmp_path: Path, mode: str, *, normalizes: bool
) -> None:
    modes = mode.split("+")
    new = _as_base_model(path, tmp_path / "model")
    (new / "modules.json").unlink()
    say_that_it_embeds(new, {"pooling_mode": modes}, normalizes=normalizes)
    texts = _texts((1, 5, 4, 140))
    expected = []
    for text in texts:
        states = _states(path, text)
        joined = np.concatenate([_pooled(states, each) for each in modes])
        expected.append(_normalized(joined) if normalizes else joined)
    model = load(new, context_length=256)
    assert model.info.embedding.dimension == 64 * len(modes)
    found = embed(model, texts)
    scale = max(float(np.abs(each).max()) for each in expected)
    assert largest_difference(found, expected) < ROUNDING * max(1.0, scale)


def test_a_text_has_the_same_vector_alone_and_with_others(model: LoadedModel) -> None:
    texts = _texts((3, 9, 10, 11, 12, 64, 65, 128, 200))
    alone = [embed(model, [text])[0] for text in texts]
    assert largest_difference(embed(model, texts), alone) < ROUNDING


def test_short_texts_share_a_call(model: LoadedModel) -> None:
    calls = []
    batch = LocalBatch.of(model)
    run = batch.executor.run
    batch.executor.run = lambda item: calls.append(item) or run(item)  # type: ignore[method-assign, func-returns-value]
    batch.add_texts(0, _texts([10] * 24))
    found = 0
    while found < 24:
        found += len(batch.step())
    batch.close()
    assert len(calls) < 8


@pytest.mark.parametrize(
    "shape", sampled(["llama", "gemma3", "mamba2", "mamba", "lfm2"], ["gemma3", "mamba", "lfm2"])
)
def test_other_architectures_give_their_own_states(load: Load, tmp_path: Path, shape: str) -> None:
    """Windows, recurrent states and convolutions, some of which take padding for text."""
    path = say_that_it_embeds(build_model(tmp_path / shape, shape, tie_word_embeddings=True))
    model = load(path, context_length=512)
    assert not model.info.embedding.problem
    texts = _texts((40, 38, 25, 1, 150))
    alone = [embed(model, [text])[0] for text in texts]
    assert largest_difference(embed(model, texts), alone) < ROUNDING
    if shape in ("llama", "gemma3", "lfm2"):
        expected = [_normalized(_states(path, text)[-1]) for text in texts]
        assert largest_difference(alone, expected) < ROUNDING


def test_vectors_and_rows_beside_each_other_are_those_alone(model: LoadedModel) -> None:
    texts = _texts((20, 150, 21))
    alone = embed(model, texts)
    prompt = _texts((30,))[0]
    expected = _tokens(model, prompt, beside=[])
    found: list[Vector] = []
    assert _tokens(model, prompt, beside=texts, found=found) == expected
    assert largest_difference(found, alone) < ROUNDING


def _tokens(
    model: LoadedModel,
    prompt: Sequence[int],
    beside: Sequence[Sequence[int]],
    found: list[Vector] | None = None,
) -> list[int]:
    """Return 20 tokens of a row, with texts that arrive after its third."""
    batch = LocalBatch.of(model)
    batch.add(0, prompt, GREEDY)
    tokens: list[int] = []
    vectors: dict[int, Vector] = {}
    is_added = not beside
    while len(tokens) < 20 or len(vectors) < len(beside):
        if len(tokens) >= 3 and not is_added:
            batch.add_texts(1, beside)
            is_added = True
        for event in batch.step():
            if isinstance(event, Token):
                tokens.append(event.token_id)
            elif isinstance(event, Embedded):
                vectors[event.text] = np.array(event.vector, dtype=np.float64)
    batch.close()
    if found is not None:
        found += [vectors[text] for text in sorted(vectors)]
    return tokens[:20]


def test_a_removed_request_frees_its_text(model: LoadedModel) -> None:
    import mlx.core as mx

    executor = model.new_executor()
    mx.clear_cache()
    before = mx.get_active_memory()
    executor.add_texts(0, _texts((400,)))
    executor.run(EmbedItem((TextChunk(0, 0, 128, is_last=False),)))
    assert mx.get_active_memory() > before
    executor.remove([0])
    assert mx.get_active_memory() <= before
    executor.close()


# -- files -----------------------------------------------------------------------


def test_a_base_model_without_prefix_embeds_and_completes_if_its_layers_are_tied(
    load: Load, model: LoadedModel, path: Path, tmp_path: Path
) -> None:
    base = load(_as_base_model(path, tmp_path / "base"), context_length=512)
    assert base.info.completes
    texts = _texts((5, 12))
    assert largest_difference(embed(base, texts), embed(model, texts)) == 0
    assert _row(base, texts[1]) == _row(model, texts[1])


def _row(model: LoadedModel, prompt: Sequence[int]) -> list[int]:
    return _tokens(model, prompt, beside=[])


def test_a_base_model_without_output_layer_only_embeds(
    load: Load, model: LoadedModel, path: Path, tmp_path: Path
) -> None:
    base = load(_as_base_model(path, tmp_path / "base", tie_word_embeddings=False))
    assert not base.info.completes
    texts = _texts((5, 12))
    assert largest_difference(embed(base, texts), embed(model, texts)) < ROUNDING


def test_a_base_model_without_output_layer_that_does_not_embed_is_refused(
    load: Load, path: Path, tmp_path: Path
) -> None:
    base = _as_base_model(path, tmp_path / "base", tie_word_embeddings=False)
    (base / "modules.json").unlink()
    with pytest.raises(ModelUnsupported, match="lm_head"):
        load(base)


def test_a_quantized_model_embeds(load: Load, tmp_path: Path) -> None:
    path = build_model(tmp_path / "model", "qwen3", quantize_bits=8)
    model = load(say_that_it_embeds(path), context_length=256)
    texts = _texts((5, 130))
    expected = [_normalized(_states(path, text)[-1]) for text in texts]
    assert largest_difference(embed(model, texts), expected) < 1e-3


def test_a_model_without_the_files_says_which_are_missing(tiny: LoadedModel) -> None:
    assert "modules.json" in tiny.info.embedding.problem
    assert tiny.info.embedding.dimension == 0


def test_another_size_of_states_than_the_files_say_is_refused(
    load: Load, path: Path, tmp_path: Path
) -> None:
    new = _as_base_model(path, tmp_path / "model")
    say_that_it_embeds(new, {"pooling_mode": "mean", "embedding_dimension": 65})
    assert "65" in load(new).info.embedding.problem


def test_the_longest_text_is_that_of_the_files_and_the_context(
    load: Load, path: Path, tmp_path: Path
) -> None:
    new = say_that_it_embeds(
        _as_base_model(path, tmp_path / "model"), transformer={"max_seq_length": 100}
    )
    limits = load(new, context_length=512).info.embedding
    assert (limits.max_tokens, limits.is_file_limit) == (100, True)
    limits = load(new, context_length=64).info.embedding
    assert (limits.max_tokens, limits.is_file_limit) == (64, False)


def test_a_vector_that_is_not_finite_is_a_failure_of_its_request(
    load: Load, tmp_path: Path
) -> None:
    import mlx.core as mx

    # With an output layer apart, the embedding of a token matters only where it occurs.
    new = build_model(tmp_path / "model", "qwen3", tie_word_embeddings=False)
    say_that_it_embeds(new, {"pooling_mode": "mean"})
    weights: Any = mx.load(str(new / "model.safetensors"))
    broken = np.array(weights["model.embed_tokens.weight"])
    broken[500] = np.nan
    weights["model.embed_tokens.weight"] = mx.array(broken)
    mx.save_safetensors(str(tmp_path / "new.safetensors"), weights)
    (tmp_path / "new.safetensors").replace(new / "model.safetensors")
    model = load(new, context_length=256)
    batch = LocalBatch.of(model)
    batch.add_texts(0, [[1, 2, 3], [4, 500]])
    batch.add_texts(1, [[1, 2]])
    events: list[Event] = []
    while len(events) < 3:
        events += batch.step()
    assert NotFinite(0) in events
    assert [event.row for event in events if isinstance(event, Embedded)].count(1) == 1
    batch.close()
