"""Adapters of a loaded model, against mlx_lm with one adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from adapter.test_batch import run_with_preemptions
from adapter.test_constraints import matcher
from adapter.test_prefix_on_disk import Loads, run_row
from runner_common.model_directory import read_adapter
from runner_server.engine.adapters import AdapterSpec
from runner_server.engine.backend import LoadedModel
from runner_server.engine.prefix_disk import BLOCK_TOKENS
from runner_server.engine.types import CachePolicy, Constraint, Dtype, LoadSpec, Sampling, Token
from runner_server.engine.work import PrefillItem, PromptChunk
from runner_server.errors import InvalidField, ModelUnsupported
from runner_server.host.model_root import ModelRoot
from runner_server.mlx_backend import MlxBackend
from support.adapters import mlx_lm_tokens, write_adapter, write_config
from support.models import build_model
from support.prefix_bench import random_prompt
from support.rows import GREEDY, Row, run_alone, run_together
from tools.local_batch import LocalBatch, decode_with_drafts, start_alone
from tools.memory.catalog import CONFIGS
from tools.memory.models import write_model

from .conftest import Load

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend.adapters.selection import Selection  # noqa: E402
from runner_server.mlx_backend.loading import loader, reading  # noqa: E402
from runner_server.mlx_backend.loading.loader import plan_load  # noqa: E402

PROMPT = random_prompt(40, 3)
OTHER = random_prompt(40, 4)
COUNT = 16

MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}

ATTENTION = ["self_attn.q_proj", "self_attn.v_proj"]

LORA: tuple[dict[str, Any], ...] = (
    {"rank": 4},
    {"rank": 8, "scale": 3.5, "num_layers": 1},
    {"rank": 2, "scale": 6.0, "keys": ATTENTION, "dtype": "bfloat16"},
)
DORA: tuple[dict[str, Any], ...] = ({**LORA[0], "kind": "dora"}, LORA[1], LORA[2])


@dataclass
class Case:
    """A model and the adapters to load with it.

    Attributes:
        shape: Shape of the model.
        adapters: Arguments of ``write_adapter`` for each.
        changes: Changes to the model's configuration, or to its files.
        dtype: Format of the weights in memory, with which mlx_lm computes the same.
    """

    shape: str = "llama"
    adapters: tuple[dict[str, Any], ...] = LORA
    changes: dict[str, Any] = field(default_factory=dict)
    dtype: Dtype = Dtype.AUTO


CASES = {
    "llama": Case(),
    "dora": Case(adapters=DORA),
    "dora with biases": Case(adapters=DORA, changes={"attention_bias": True, "mlp_bias": True}),
    "quantized": Case(changes={"quantize_bits": 4}, dtype=Dtype.AS_STORED),
    "quantized dora": Case("qwen3", DORA, {"quantize_bits": 8}, Dtype.AS_STORED),
    "experts": Case("qwen3", changes=MOE),
    "quantized experts": Case("qwen3", changes={**MOE, "quantize_bits": 4}, dtype=Dtype.AS_STORED),
    "windows": Case("gemma3"),
    "convolutions": Case("lfm2", ({"rank": 4}, {"rank": 3, "num_layers": 1}, {"rank": 2})),
}


@dataclass
class Loaded:
    """A loaded model with its adapters.

    Attributes:
        path: The model's directory.
        adapters: The adapters' directories by name.
    """

    path: Path
    adapters: dict[str, Path]
    model: LoadedModel

    def expected(self, adapter: str, prompt: list[int] | None = None) -> list[int]:
        """Return the tokens that mlx_lm generates with an adapter, or without one for ""."""
        return mlx_lm_tokens(self.path, self.adapters.get(adapter), prompt or PROMPT, COUNT)


def specs(adapters: dict[str, Path]) -> tuple[AdapterSpec, ...]:
    """Return the adapters of a load."""
    return tuple(AdapterSpec(name, str(path)) for name, path in adapters.items())


def load_case(load: Load, folder: Path, case: Case) -> Loaded:
    """Write and load the model of a case."""
    path = build_model(folder / "model", case.shape, **case.changes)
    adapters = {
        f"a{index}": write_adapter(folder / f"a{index}", path, seed=index + 1, **arguments)
        for index, arguments in enumerate(case.adapters)
    }
    spec = {"parallel": 8, "dtype": case.dtype, "adapters": specs(adapters)}
    return Loaded(path, adapters, load(path, **spec))


@pytest.fixture(scope="module")
def plain(load: Load, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A small Llama with three adapters."""
    return load_case(load, tmp_path_factory.mktemp("plain"), CASES["llama"])


# -- the tokens ------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_have_the_tokens_of_mlx_lm_with_their_adapter(
    load: Load, tmp_path: Path, case: Case
) -> None:
    loaded = load_case(load, tmp_path, case)
    assert loaded.model.info.parallel == 8, loaded.model.info.warnings
    names = ["", *loaded.adapters]
    expected = {name: loaded.expected(name) for name in names}
    assert len({tuple(ids) for ids in expected.values()}) == len(names)
    for name in names:
        assert run_alone(loaded.model, Row(PROMPT, COUNT, adapter=name)) == expected[name]
    # All prompts share one call; then rows join and leave at different steps.
    for late in (0, 2):
        order = ["a1", "", "a0", "a2", "a1", ""]
        rows = [
            Row(PROMPT, COUNT - index, adapter=name, late=index * late)
            for index, name in enumerate(order)
        ]
        found = run_together(loaded.model, rows)
        assert found == [expected[row.adapter][: row.count] for row in rows]


def test_a_request_without_adapter_has_the_logits_of_the_model_alone(
    load: Load, plain: Loaded
) -> None:
    sampling = Sampling(temperature=0, logprobs=4)

    def logprobs(model: LoadedModel, *others: str) -> list[Any]:
        row = Row(PROMPT, COUNT, sampling)
        run_together(model, [row, *(Row(OTHER, COUNT, adapter=name) for name in others)])
        return row.logprobs

    without = load(plain.path, parallel=8)
    assert logprobs(plain.model) == logprobs(without)
    # Bit by bit, because what other rows have adds nothing to the row.
    assert logprobs(plain.model, "a0", "a1") == logprobs(without, "", "")


def test_drafts_leave_the_tokens_as_they_are(plain: Loaded) -> None:
    expected = plain.expected("a0")
    wrong = [*expected[:6], (expected[6] + 1) % plain.model.info.vocab_size]
    executor = start_alone(plain.model, PROMPT, GREEDY, adapter="a0")
    tokens, drafted = decode_with_drafts(executor, COUNT, lambda done: wrong[done : done + 4])
    assert [token.token_id for token in tokens] == expected
    assert 0 < sum(token.is_drafted for token in tokens) < drafted


def test_preempted_rows_keep_their_adapters(plain: Loaded) -> None:
    rows = [Row(PROMPT, COUNT, adapter=name) for name in ("a0", "", "a1", "a0")]
    run_with_preemptions(LocalBatch.of(plain.model), rows, {0: 1, 1: 0, 2: 2})
    assert [row.ids for row in rows] == [plain.expected(row.adapter) for row in rows]


def test_a_constraint_applies_to_rows_with_adapters(plain: Loaded) -> None:
    choice = Constraint("choice", ("def main", "return 0", "naïve café"))
    rows = [
        Row(PROMPT, 30, ends={0}, adapter=name, matcher=matcher(plain.model, choice))
        for name in ("a0", "a1", "")
    ]
    run_together(plain.model, rows)
    for row in rows:
        assert plain.model.codec.decode(row.ids[:-1]) in choice.texts


def test_log_probabilities_of_a_prompt_are_those_with_its_adapter(plain: Loaded) -> None:
    def found(adapter: str) -> list[float]:
        executor = plain.model.new_executor()
        sampling = Sampling(prompt_logprobs=0)
        executor.add(0, PROMPT, sampling, CachePolicy(), adapter=adapter)
        chunk = PromptChunk(0, 0, len(PROMPT) - 1, is_stored=False)
        report = executor.run(PrefillItem((chunk,)))
        executor.close()
        assert report.prompt_logprobs
        return list(report.prompt_logprobs.chosen)

    assert found("a0") != found("")


# -- the prefix cache --------------------------------------------------------------


def test_adapters_share_no_prefixes(plain: Loaded) -> None:
    infos = {info.name: info for info in plain.model.info.adapters}
    salts = {"": "", **{name: info.cache_salt("") for name, info in infos.items()}}
    batch = LocalBatch.of(plain.model)
    prompt = random_prompt(40, 6)

    def run(name: str) -> tuple[list[int], int]:
        ids: list[int] = []
        cached = 0
        batch.add(0, prompt, GREEDY, CachePolicy(salt=salts[name]), adapter=name)
        while len(ids) < COUNT:
            for event in batch.step():
                if isinstance(event, Token):
                    ids.append(event.token_id)
                else:
                    cached = getattr(event, "cached", 0)
        batch.remove([0])
        return ids, cached

    expected = {name: plain.expected(name, prompt) for name in salts}
    assert {name: run(name) for name in salts} == {name: (expected[name], 0) for name in salts}
    again = {name: run(name) for name in salts}
    assert {name: ids for name, (ids, _) in again.items()} == expected
    assert all(cached > 0 for _, cached in again.values())
    batch.close()


def test_a_prefix_on_disk_belongs_to_the_weights_of_an_adapter(loads: Loads, plain: Loaded) -> None:
    prompt = random_prompt(2 * BLOCK_TOKENS + 20, 5)
    renamed = {"other": plain.adapters["a0"], "a0": plain.adapters["a1"]}

    def run(adapters: dict[str, Path], name: str) -> tuple[list[int], int]:
        with loads.load(plain.path, adapters=specs(adapters)) as model:
            salts = {info.name: info.cache_salt("") for info in model.info.adapters}
            return run_row(model, prompt, GREEDY, CachePolicy(salt=salts.get(name, "")), name)

    def expected(adapter: Path | None) -> list[int]:
        return mlx_lm_tokens(plain.path, adapter, prompt, 8)

    first, second = plain.adapters["a0"], plain.adapters["a1"]
    assert run(plain.adapters, "a0") == (expected(first), 0)
    assert run(plain.adapters, "") == (expected(None), 0)
    # The names are swapped, and the weights are not.
    assert run(renamed, "a0") == (expected(second), 0)
    assert run(renamed, "other") == (expected(first), 2 * BLOCK_TOKENS)


# -- the memory ------------------------------------------------------------------


def test_the_plan_counts_the_tensors(plain: Loaded) -> None:
    def planned(*names: str) -> int:
        adapters = specs({name: plain.adapters[name] for name in names})
        spec = LoadSpec(str(plain.path), parallel=8, adapters=adapters)
        return plan_load(plain.path, spec).need.weight_bytes

    def stored(name: str, width: int = 1) -> int:
        return width * read_adapter(plain.adapters[name]).nbytes

    assert planned("a0") == planned() + stored("a0")
    # The third one is stored in 16 bits, and held in 32 like the model.
    assert planned("a0", "a1", "a2") == planned() + stored("a0") + stored("a1") + stored("a2", 2)
    assert planned("a0", "a1", "a2") == plain.model.info.weight_bytes


# -- refusals --------------------------------------------------------------------


def _without(path: Path, name: str) -> None:
    tensors = mx.load(str(path / "adapters.safetensors"))
    tensors.pop(name)
    mx.save_safetensors(str(path / "adapters.safetensors"), tensors)


def _with(path: Path, name: str, value: Any) -> None:
    tensors = mx.load(str(path / "adapters.safetensors"))
    mx.save_safetensors(str(path / "adapters.safetensors"), {**tensors, name: value})


def _cut(path: Path) -> None:
    file = path / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _configured(path: Path, **values: Any) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    write_config(path, **{**config, **values})


def _as_peft(path: Path) -> None:
    (path / "adapters.safetensors").rename(path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')


QUERY = "model.layers.0.self_attn.q_proj"
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (
        lambda path: _without(path, f"{QUERY}.lora_a"),
        rf"the adapter 'bad' in .* does not fit the model: {QUERY}\.lora_a is missing$",
    ),
    "extra": (
        lambda path: _with(path, "model.norm.lora_a", mx.zeros((2, 2))),
        r"model\.norm\.lora_a belongs to no layer that the adapter changes$",
    ),
    "shape": (
        lambda path: _with(path, f"{QUERY}.lora_b", mx.zeros((4, 32))),
        rf"{QUERY}\.lora_b has the shape \(4, 32\), and the model needs \(4, 64\)$",
    ),
    "type": (
        lambda path: _with(path, f"{QUERY}.lora_b", mx.zeros((4, 64), dtype=mx.int32)),
        rf"{QUERY}\.lora_b has the type I32; expected BF16, F16, F32$",
    ),
    "many": (
        lambda path: _configured(path, lora_parameters={"rank": 5, "scale": 1.0}),
        r"; and 25 more$",
    ),
    "cut": (_cut, r"the adapter in .* the file is cut short; download it again$"),
    "no tensors": (
        lambda path: (path / "adapters.safetensors").unlink(),
        r"it has no adapters\.safetensors$",
    ),
    "no configuration": (
        lambda path: (path / "adapter_config.json").unlink(),
        r"no adapter_config\.json in ",
    ),
    "full": (
        lambda path: _configured(path, fine_tune_type="full"),
        r"fine_tune_type is 'full'.*mlx_lm\.fuse, and load the result as a model$",
    ),
    "kind": (
        lambda path: _configured(path, fine_tune_type="prefix"),
        r"fine_tune_type is 'prefix'; expected 'lora' or 'dora'$",
    ),
    "peft": (_as_peft, r"it is a PEFT adapter; merge it .* with mlx_lm\.convert, or convert"),
    "alpha": (
        lambda path: _configured(path, lora_parameters={"rank": 4, "alpha": 8}),
        r"lora_parameters\.scale is missing; expected a number, and alpha.* is not read$",
    ),
    "rank": (
        lambda path: _configured(path, lora_parameters={"rank": 0, "scale": 1.0}),
        r"lora_parameters\.rank is 0; expected a whole number, 1 or more$",
    ),
    "layers": (
        lambda path: _configured(path, num_layers=None),
        r"num_layers is missing; expected a whole number$",
    ),
    "keys": (
        lambda path: _configured(
            path, lora_parameters={"rank": 4, "scale": 1.0, "keys": ["model.embed_tokens"]}
        ),
        r"model\.embed_tokens is a layer of type Embedding, which this server cannot adapt$",
    ),
    "nothing": (
        lambda path: _configured(
            path, lora_parameters={"rank": 4, "scale": 1.0, "keys": ["mlp.router"]}
        ),
        r"belongs to no layer that the adapter changes",
    ),
    "not finite": (
        lambda path: _with(path, f"{QUERY}.lora_b", mx.full((4, 64), float("nan"))),
        r"with the adapter 'bad', the model's logits are not finite",
    ),
}


@pytest.mark.parametrize(("damage", "message"), FAULTS.values(), ids=FAULTS)
def test_an_adapter_that_cannot_be_used_is_refused(
    load: Load, plain: Loaded, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    bad = Path(shutil.copytree(plain.adapters["a0"], tmp_path / "bad"))
    damage(bad)
    with pytest.raises(ModelUnsupported, match=message):
        load(plain.path, adapters=specs({"good": plain.adapters["a1"], "bad": bad}))


@pytest.mark.parametrize("name", ["cut", "peft", "rank"])
def test_a_check_of_the_files_finds_what_their_headers_show(
    backend: MlxBackend, plain: Loaded, tmp_path: Path, name: str
) -> None:
    damage, message = FAULTS[name]
    bad = Path(shutil.copytree(plain.adapters["a0"], tmp_path / "bad"))
    damage(bad)
    with pytest.raises(ModelUnsupported, match=message):
        backend.check(LoadSpec(str(plain.path), adapters=specs({"bad": bad})))


def test_a_missing_directory_is_refused_by_the_name_of_the_field(
    load: Load, plain: Loaded, tmp_path: Path
) -> None:
    with pytest.raises(InvalidField) as refused:
        load(plain.path, adapters=specs({"a0": plain.adapters["a0"], "no": tmp_path / "no"}))
    ((name, text),) = refused.value.violations
    assert name == "adapters[1].path"
    assert "is not a directory" in text


def test_an_adapter_outside_the_model_root_is_refused(plain: Loaded, tmp_path: Path) -> None:
    inside = Path(shutil.copytree(plain.path, tmp_path / "root" / "model"))
    (tmp_path / "root" / "link").symlink_to(plain.adapters["a0"])
    backend = MlxBackend(ModelRoot((tmp_path / "root").resolve()))
    for path in (plain.adapters["a0"], tmp_path / "root" / "link", tmp_path / "none"):
        with pytest.raises(InvalidField) as refused:
            backend.check(LoadSpec(str(inside), adapters=specs({"a0": path})))
        ((name, text),) = refused.value.violations
        assert (name, "below its --model-root" in text) == ("adapters[0].path", True)


def test_dora_for_experts_is_refused_as_by_mlx_lm(load: Load, tmp_path: Path) -> None:
    path = build_model(tmp_path / "model", "qwen3", **MOE)
    adapter = write_adapter(tmp_path / "adapter", path)
    _configured(adapter, fine_tune_type="dora")
    with pytest.raises(ModelUnsupported, match="is a layer of experts, for which mlx_lm has no"):
        load(path, adapters=specs({"a": adapter}))


def test_an_adapter_that_changes_during_the_load_is_refused(
    load: Load, plain: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(shutil.copytree(plain.adapters["a0"], tmp_path / "own"))
    tensors = (own / "adapters.safetensors").read_bytes()

    def read(*arguments: Any) -> None:
        read_files(*arguments)
        (own / "adapters.safetensors").write_bytes(tensors)

    read_files = reading.read_files
    monkeypatch.setattr(loader, "read_files", read)
    with pytest.raises(ModelUnsupported, match=r"of the adapter 'own' in .* were changed during"):
        load(plain.path, adapters=specs({"own": own}))


def test_a_model_that_mixes_adapters_wrongly_runs_one_request_at_a_time(
    load: Load, plain: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_alike(self: Selection, _row: int) -> int:
        return 0 if self.rows is None else self.rows[0]

    monkeypatch.setattr(Selection, "number_of", all_alike)
    info = load(plain.path, parallel=4, adapters=specs(plain.adapters)).info
    assert info.parallel == 1
    assert any("with adapters, logits differ" in warning for warning in info.warnings)


def test_a_model_that_gives_layers_single_tokens_runs_one_request_at_a_time(
    load: Load, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "model", CONFIGS["dbrx"])
    adapter = write_adapter(tmp_path / "adapter", path)
    prompt = [id_ % 200 + 1 for id_ in PROMPT[:20]]
    model = load(path, context_length=64, allow_inexact=True, adapters=specs({"a": adapter}))
    assert model.info.parallel == 1
    for name, source in (("a", adapter), ("", None)):
        expected = mlx_lm_tokens(path, source, prompt, 8)
        assert run_alone(model, Row(prompt, 8, adapter=name)) == expected


def test_a_model_without_adapters_has_the_layers_of_mlx_lm(load: Load, plain: Loaded) -> None:
    model: Any = load(plain.path)
    kinds = {type(module).__module__ for _, module in model._model.named_modules()}
    assert not [kind for kind in kinds if kind.startswith("runner_server")]


@pytest.fixture
def loads(backend: MlxBackend, tmp_path: Path) -> Loads:
    """Loads with an empty directory for prefixes."""
    return Loads(backend, tmp_path / "prefixes")
