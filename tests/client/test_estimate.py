"""The estimate from headers and configuration alone, without the server's packages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner_client.errors import InvalidRequestError, ModelNotFoundError, ModelUnsupportedError
from runner_client.memory.estimation import MemoryEstimate, estimate
from runner_client.memory.header_need import PROCESS_BYTES, WORKING_MINIMUM_BYTES
from runner_common.units import format_bytes
from support.safetensors_files import Shapes, attention, write_model, write_tensors

HIDDEN, KV_ROWS, LAYERS = 64, 32, 3

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}

EMBEDDING: Shapes = {"model.embed_tokens.weight": ("BF16", (100, HIDDEN))}
PLAIN: Shapes = {**EMBEDDING, **attention("model.", LAYERS, HIDDEN, KV_ROWS)}
PLAIN_COUNT = 100 * HIDDEN + LAYERS * 2 * KV_ROWS * HIDDEN


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner_client.memory.estimation.can_ask", lambda: False)


def estimate_of(
    path: Path, shapes: Shapes = PLAIN, /, *, config: Any = None, **kwargs: Any
) -> MemoryEstimate:
    """Return the estimate of a model of these tensors, by default for the CPU and one sequence."""
    model = write_model(path / "model", shapes, {**CONFIG, **(config or {})})
    return estimate(str(model), **{"backend": "cpu", "parallel": 1, **kwargs})


def test_a_requested_prefix_cache_is_a_visible_part(tmp_path: Path) -> None:
    plain = estimate_of(tmp_path, prefix_cache_bytes=0)
    (tmp_path / "asked").mkdir()
    asked = estimate_of(tmp_path / "asked", prefix_cache_bytes=10**9)
    assert asked.parts["prefix cache"] == 10**9
    assert asked.total_bytes == plain.total_bytes + 10**9 == asked.required_bytes
    assert asked.parts == {**plain.parts, "prefix cache": 10**9}


def test_a_draft_model_counts_once_for_all_sequences(tmp_path: Path) -> None:
    need = estimate_of(tmp_path, prefix_cache_bytes=0)
    path = str(tmp_path / "model")
    drafted = estimate(path, backend="cpu", parallel=3, prefix_cache_bytes=0, draft_model=path)
    assert drafted.weight_bytes == 2 * need.weight_bytes
    assert drafted.kv_bytes == 4 * need.kv_bytes


@pytest.mark.parametrize(
    ("longest", "context_length", "counted"),
    [(16_384, 512, 512), (16_384, 16_384, 16_384), (1024, 16_384, 1024)],
)
def test_a_draft_model_counts_with_the_context_of_the_load(
    tmp_path: Path, longest: int, context_length: int, counted: int
) -> None:
    """As far as the draft model supports that context."""
    path, draft = str(tmp_path / "model"), str(tmp_path / "draft")
    write_model(Path(path), PLAIN, {**CONFIG, "max_position_embeddings": 16_384})
    write_model(Path(draft), PLAIN, {**CONFIG, "max_position_embeddings": longest})
    options: dict[str, Any] = {"backend": "cpu", "parallel": 1, "prefix_cache_bytes": 0}
    need = estimate(path, context_length=context_length, **options)
    drafted = estimate(path, context_length=context_length, draft_model=draft, **options)
    own = estimate(draft, context_length=counted, **options)
    assert drafted.kv_bytes == need.kv_bytes + own.kv_bytes


@pytest.mark.parametrize(("parallel", "sequences"), [(1, 1), (4, 1), (8, 2)])
def test_a_default_prefix_cache_is_counted_but_not_required(
    tmp_path: Path, parallel: int, sequences: int
) -> None:
    need = estimate_of(tmp_path, parallel=parallel)
    assert need.prefix_cache_bytes == sequences * need.kv_bytes // parallel
    assert need.has_default_prefix_cache
    assert need.required_bytes == need.total_bytes - need.prefix_cache_bytes


@pytest.mark.parametrize("wrong", [-1, 2**63])
def test_prefix_cache_out_of_range_is_refused_by_name(tmp_path: Path, wrong: int) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        estimate_of(tmp_path, prefix_cache_bytes=wrong)
    assert [field for field, _ in caught.value.field_violations] == ["prefix_cache_bytes"]


def test_the_total_is_the_sum_of_the_visible_parts(tmp_path: Path) -> None:
    need = estimate_of(tmp_path)
    parts = (
        *(need.weight_bytes, need.kv_bytes, need.prefix_cache_bytes),
        *(need.working_bytes, need.process_bytes, need.load_transient_bytes),
    )
    assert need.total_bytes == sum(parts) == sum(need.parts.values())
    assert all(part > 0 for part in parts)


@pytest.mark.parametrize(
    ("dtype", "backend", "resolved", "item_bytes"),
    [
        ("auto", "cpu", "float32", 4),
        ("auto", "metal", "as_stored", 2),
        ("auto", "cuda", "as_stored", 2),
        ("as_stored", "cpu", "as_stored", 2),
        ("float16", "cpu", "float16", 2),
        ("float32", "metal", "float32", 4),
    ],
)
def test_weights_and_kv_have_the_resolved_type(
    tmp_path: Path, dtype: str, backend: str, resolved: str, item_bytes: int
) -> None:
    need = estimate_of(tmp_path, dtype=dtype, backend=backend, context_length=256)
    assert need.dtype == resolved
    assert need.file_bytes == 2 * PLAIN_COUNT
    assert need.weight_bytes == item_bytes * PLAIN_COUNT
    assert need.kv_bytes == LAYERS * 2 * KV_ROWS * 256 * item_bytes


def test_a_conversion_counts_sources_beside_their_copies(tmp_path: Path) -> None:
    """Every source of a small model counts; of a large one, 64 MiB or the largest tensor."""
    assert estimate_of(tmp_path).load_transient_bytes == 2 * PLAIN_COUNT
    many: Shapes = {f"model.layers.{i}.mlp.up_proj.weight": ("BF16", (1024, 8192)) for i in (0, 1)}
    need = estimate_of(tmp_path, {**many, "model.embed_tokens.weight": ("BF16", (5000, 8192))})
    assert need.load_transient_bytes == 5000 * 8192 * 2
    need = estimate_of(
        tmp_path, {f"model.layers.{i}.w.weight": ("BF16", (1024, 8192)) for i in range(6)}
    )
    assert need.load_transient_bytes == 64 * 2**20
    assert estimate_of(tmp_path, dtype="as_stored").load_transient_bytes == 0


def test_stacked_experts_count_as_one_source(tmp_path: Path) -> None:
    experts: Shapes = {
        f"model.layers.0.mlp.experts.{number}.up_proj.weight": ("BF16", (50, HIDDEN))
        for number in range(8)
    }
    need = estimate_of(tmp_path, {**PLAIN, **experts}, dtype="as_stored")
    assert need.load_transient_bytes == 8 * 50 * HIDDEN * 2


def quantized(bits: int, group_size: int, columns: int = 256, rows: int = 10) -> Shapes:
    packed = columns * bits // 32
    return {
        "model.layers.0.mlp.up_proj.weight": ("U32", (rows, packed)),
        "model.layers.0.mlp.up_proj.scales": ("BF16", (rows, columns // group_size)),
        "model.layers.0.mlp.up_proj.biases": ("BF16", (rows, columns // group_size)),
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_packed_weights_count_at_their_unpacked_size(
    tmp_path: Path, bits: int, group_size: int
) -> None:
    config = {"quantization": {"bits": bits, "group_size": group_size}}
    need = estimate_of(tmp_path, quantized(bits, group_size), config=config)
    assert need.weight_bytes == 10 * 256 * 4
    assert need.file_bytes == 10 * 256 * bits // 8 + 2 * 10 * (256 // group_size) * 2


def test_a_layer_may_declare_its_own_quantization(tmp_path: Path) -> None:
    quantization = {
        "bits": 4,
        "group_size": 64,
        "model.layers.0.mlp.up_proj": {"bits": 8, "group_size": 32},
    }
    need = estimate_of(tmp_path, quantized(8, 32), config={"quantization": quantization})
    assert need.weight_bytes == 10 * 256 * 4


def test_undeclared_packing_is_never_underestimated(tmp_path: Path) -> None:
    need = estimate_of(
        tmp_path, quantized(8, 64), config={"quantization": {"bits": 4, "group_size": 32}}
    )
    assert need.weight_bytes >= 10 * 256 * 4


def test_packed_weights_stay_packed_as_stored(tmp_path: Path) -> None:
    config = {"quantization": {"bits": 4, "group_size": 64}}
    need = estimate_of(tmp_path, quantized(4, 64), config=config, backend="metal")
    assert need.weight_bytes == need.file_bytes
    assert need.load_transient_bytes == 0


@pytest.mark.parametrize(
    ("shapes", "quantization", "count"),
    [
        ({"m.q.qweight": ("I32", (8, 16)), "m.q.qzeros": ("I32", (1, 2))}, {"bits": 4}, 8 * 16 * 8),
        ({"m.e_blocks": ("U8", (4, 16)), "m.e_scales": ("U8", (4, 1))}, {}, 4 * 16 * 2),
        ({"m.w.weight": ("F8_E4M3", (4, 16))}, {}, 4 * 16),
    ],
    ids=["awq", "mxfp4 blocks", "fp8"],
)
def test_other_packings_count_at_their_unpacked_size_too(
    tmp_path: Path, shapes: Shapes, quantization: dict[str, Any], count: int
) -> None:
    need = estimate_of(tmp_path, shapes, config={"quantization_config": quantization})
    assert need.weight_bytes == count * 4


def test_tensors_dropped_by_the_text_model_do_not_count(tmp_path: Path) -> None:
    dropped: Shapes = {
        "vision_tower.encoder.layers.0.fc.weight": ("BF16", (500, 500)),
        "model.visual.blocks.0.fc.weight": ("BF16", (500, 500)),
    }
    need = estimate_of(tmp_path, {**PLAIN, **dropped})
    assert need.weight_bytes == 4 * PLAIN_COUNT
    assert need.file_bytes > 2 * PLAIN_COUNT


def test_adapters_count_as_float32(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_tensors(adapter / "adapters.safetensors", {"a": ("F32", (8, 2)), "b": ("F16", (2, 9))})
    parameters = {"rank": 2, "scale": 1.0}
    config = {"num_layers": 1, "lora_parameters": parameters}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    need = estimate_of(tmp_path, adapters={"one": str(adapter)})
    assert need.weight_bytes == 4 * (PLAIN_COUNT + 16 + 18)
    (adapter / "adapters.safetensors").unlink()
    with pytest.raises(ModelUnsupportedError, match=r"has no adapters\.safetensors"):
        estimate_of(tmp_path, adapters={"one": str(adapter)})


def test_integer_tensors_keep_their_size(tmp_path: Path) -> None:
    assert estimate_of(tmp_path, {"ids": ("I64", (5,))}).weight_bytes == 40


@pytest.mark.parametrize(("tokens", "held"), [(2, 256), (256, 256), (257, 512), (1000, 1024)])
def test_kv_is_allocated_in_steps(tmp_path: Path, tokens: int, held: int) -> None:
    need = estimate_of(tmp_path, context_length=tokens)
    assert need.kv_bytes == LAYERS * 2 * KV_ROWS * held * 4


@pytest.mark.parametrize(("bits", "number_bytes"), [(8, 1.25), (4, 0.75)])
def test_quantized_kv_counts_scales_and_biases_in_float32(
    tmp_path: Path, bits: int, number_bytes: float
) -> None:
    need = estimate_of(tmp_path, context_length=256, kv_bits=bits)
    assert need.kv_bytes == LAYERS * 2 * KV_ROWS * 256 * number_bytes


def test_every_parallel_sequence_has_its_own_kv(tmp_path: Path) -> None:
    one, four = (
        estimate_of(tmp_path, context_length=300),
        estimate_of(tmp_path, context_length=300, parallel=4),
    )
    assert four.kv_bytes == 4 * one.kv_bytes
    assert four.weight_bytes == one.weight_bytes


@pytest.mark.parametrize(("longest", "assumed"), [(2048, 2048), (131072, 4096), (None, 4096)])
def test_the_default_context_length_is_the_runners(
    tmp_path: Path, longest: Any, assumed: int
) -> None:
    need = estimate_of(tmp_path, config={"max_position_embeddings": longest})
    assert need.context_length == assumed
    assert need.model_context_length == (longest if isinstance(longest, int) else assumed)


def kv_tokens(need: MemoryEstimate) -> int:
    return need.kv_bytes // (2 * KV_ROWS * 4)


@pytest.mark.parametrize(
    ("config", "held"),
    [
        ({"model_type": "gemma3_text", "sliding_window": 512, "sliding_window_pattern": 3},
         512 + 512 + 2048),
        ({"model_type": "gemma3_text"}, 3 * 512),
        ({"model_type": "llama", "sliding_window": 512,
          "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
         512 + 2048 + 2048),
        ({"model_type": "gpt_oss", "sliding_window": 128}, 128 + 2048 + 128),
        # mlx_lm caches the full context for these, whatever their configuration says.
        ({"model_type": "mistral", "sliding_window": 512}, 3 * 2048),
        ({"model_type": "gemma2", "sliding_window": 512,
          "layer_types": ["sliding_attention"] * 3}, 3 * 2048),
    ],
    ids=["pattern", "default pattern", "types", "gpt_oss", "no types", "not rotating"],
)  # fmt: skip
def test_sliding_layers_hold_their_window(
    tmp_path: Path, config: dict[str, Any], held: int
) -> None:
    assert kv_tokens(estimate_of(tmp_path, config=config, context_length=2048)) == held


def test_a_window_longer_than_the_context_changes_nothing(tmp_path: Path) -> None:
    config = {"model_type": "gemma3_text", "sliding_window": 4096}
    assert kv_tokens(estimate_of(tmp_path, config=config, context_length=1000)) == 3 * 1024


def test_a_nested_text_configuration_counts(tmp_path: Path) -> None:
    nested = {
        "model_type": "gemma3_text",
        "sliding_window": 512,
        "sliding_window_pattern": 3,
        "max_position_embeddings": 1024,
    }
    need = estimate_of(tmp_path, config={"model_type": "gemma3", "text_config": nested})
    assert need.context_length == 1024
    assert kv_tokens(need) == 512 + 512 + 1024


def test_fused_projections_are_sized_by_the_configuration(tmp_path: Path) -> None:
    need = estimate_of(tmp_path, EMBEDDING, context_length=256)
    assert need.kv_bytes == LAYERS * 2 * (2 * 64 // 4) * 256 * 4
    explicit = estimate_of(tmp_path, EMBEDDING, config={"head_dim": 100}, context_length=256)
    assert explicit.kv_bytes == LAYERS * 2 * (2 * 100) * 256 * 4


def test_projection_shapes_override_the_configuration(tmp_path: Path) -> None:
    need = estimate_of(tmp_path, config={"num_key_value_heads": 99}, context_length=256)
    assert need.kv_bytes == LAYERS * 2 * KV_ROWS * 256 * 4


def test_vision_layers_have_no_cache(tmp_path: Path) -> None:
    shapes = {**PLAIN, **attention("vision_tower.encoder.", 9, HIDDEN, 500)}
    assert (
        estimate_of(tmp_path, shapes, context_length=256).kv_bytes == LAYERS * 2 * KV_ROWS * 256 * 4
    )


def test_layers_that_share_a_cache_have_none_of_their_own(tmp_path: Path) -> None:
    need = estimate_of(tmp_path, config={"num_kv_shared_layers": 1}, context_length=256)
    assert kv_tokens(need) == (LAYERS - 1) * 256


@pytest.mark.parametrize(
    ("model_type", "per_token"), [("deepseek_v3", 512 + 64), ("deepseek_v2", 4 * (128 + 64 + 128))]
)
def test_latent_attention_caches_what_mlx_lm_caches(
    tmp_path: Path, model_type: str, per_token: int
) -> None:
    config = {
        "model_type": model_type,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    }
    need = estimate_of(tmp_path, EMBEDDING, config=config, context_length=256)
    assert need.kv_bytes == LAYERS * per_token * 256 * 4


def test_an_unknown_kv_cache_is_noted(tmp_path: Path) -> None:
    model = write_model(tmp_path / "odd", EMBEDDING, {"model_type": "mamba"})
    need = estimate(str(model), backend="cpu")
    assert need.kv_bytes == 0
    assert need.notes[1:] == ("KV cache not counted: config.json does not specify its size",)
    assert len(estimate_of(tmp_path).notes) == 1


@pytest.mark.parametrize("backend", ["cpu", "metal"])
def test_the_source_of_the_estimate_is_noted(tmp_path: Path, backend: str) -> None:
    assert estimate_of(tmp_path, backend=backend).notes[0].startswith("computed from the headers")


def test_working_memory_is_a_twentieth_and_at_least_64_mib(tmp_path: Path) -> None:
    assert estimate_of(tmp_path).working_bytes == WORKING_MINIMUM_BYTES == 64 * 1024**2
    large = estimate_of(tmp_path, {**PLAIN, "big": ("F32", (1 << 30,))})
    assert large.working_bytes == (large.weight_bytes + large.kv_bytes) // 20
    assert large.process_bytes == PROCESS_BYTES


def test_arguments_out_of_range_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="context_length: 1 is not in the range 2 to"):
        estimate_of(tmp_path, context_length=1)
    with pytest.raises(InvalidRequestError, match="parallel: 0 is not in the range 1 to 256"):
        estimate_of(tmp_path, parallel=0)
    config = {"max_position_embeddings": 1024}
    with pytest.raises(InvalidRequestError, match="1,025 is not in the range 2 to 1,024"):
        estimate_of(tmp_path, config=config, context_length=1025)


def test_a_missing_model_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        estimate(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (457 * 1024**2, "457.0 MiB"),
        (int(4.3 * 1024**3), "4.3 GiB"),
        (5 * 1024**4, "5.0 TiB"),
    ],
)
def test_bytes_are_formatted_with_units(count: int, text: str) -> None:
    assert format_bytes(count) == text
