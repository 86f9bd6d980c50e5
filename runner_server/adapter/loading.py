"""From a directory to a model in memory, in steps that can be watched and cancelled.

1. Find the directory and read its configuration; refuse what needs code of its own.
2. Build the model with lazy weights: nothing is read yet, all sizes are known.
3. Choose the format of the weights, and refuse what does not fit.
4. Read the weights, part by part, reporting progress.
5. Generate a token, which compiles what has to be compiled.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from mlxrunner.hostmemory import free_memory
from mlxrunner.units import format_bytes
from runner_server.adapter._directory import DEFAULT_CONTEXT, damage, max_context, read_config
from runner_server.adapter._files import require_files
from runner_server.adapter._finding import find, find_below
from runner_server.adapter._reading import read_weights
from runner_server.adapter.batch import MlxBatch, PromptCache
from runner_server.adapter.caches import CachePieces
from runner_server.adapter.codec import FastCodec, load_codec
from runner_server.adapter.kv import Probe, probe
from runner_server.adapter.names import dequantize_model, load_model
from runner_server.adapter.threads import fit_threads
from runner_server.errors import (
    GenerationFailed,
    InsufficientMemory,
    InvalidField,
    ModelUnsupported,
)
from runner_server.messages import Dtype, LoadSpec, ModelInfo, Sampling, Token
from runner_server.model_root import ModelRoot
from runner_server.prefix import Held, PrefixTree

if TYPE_CHECKING:
    from runner_server.adapter.sharding import Shard

logger = logging.getLogger(__name__)

Report = Callable[[int], None]

_PREFILL_CHUNK = {"cpu": 128, "gpu": 1024}
"""Most tokens of a prompt that are evaluated at once: it bounds the memory that takes."""

_PREFIX_SHARE = 5
"""Of what weights and KV cache leave free, one part in so many keeps evaluated prompts."""

_MX_DTYPES = {
    Dtype.FLOAT32: mx.float32,
    Dtype.BFLOAT16: mx.bfloat16,
    Dtype.FLOAT16: mx.float16,
}


class MlxModel:
    """A model in memory.

    Args:
        model: The evaluated model.
        codec: Its tokenizer.
        info: What it is, and the limits in force.
        plan: What was decided before it was read.
        shard: The part of it that this rank has; None is all.
    """

    def __init__(
        self,
        model: Module,
        codec: FastCodec,
        info: ModelInfo,
        plan: _Plan,
        shard: Shard | None,
    ) -> None:
        self._model = model
        self._plan = plan
        self._shard = shard
        self._pieces = CachePieces.of(model)
        self._prompts: PromptCache = PrefixTree(self._pieces, info.prefix_cache_bytes)
        self.codec = codec
        self.info = info

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of KV cache for one sequence; see ``LoadedModel.kv_bytes``."""
        return self._plan.kv_bytes(tokens)

    @property
    def prompts_held(self) -> Held:
        """How much the evaluated prompts that are kept take."""
        return self._prompts.held

    def new_batch(self) -> MlxBatch:
        """An empty batch."""
        return self._batch(self._prompts)

    def warm_up(self) -> None:
        """Generates a token, so that kernels are compiled before the first user waits."""
        batch = self._batch(PrefixTree(self._pieces, 0))
        try:
            batch.add(0, [0, 0], Sampling(top_k=min(2, self.info.vocab_size)))
            while not any(isinstance(event, Token) for event in batch.step()):
                pass
        finally:
            batch.close()

    def _batch(self, prompts: PromptCache) -> MlxBatch:
        chunk = _PREFILL_CHUNK[_device_kind()]
        model, vocab_size, shard = self._model, self.info.vocab_size, self._shard
        if shard is None:
            return MlxBatch(model, vocab_size, chunk, self._pieces, prompts)
        clock, agree = shard.partners.clock, shard.agree
        return MlxBatch(model, vocab_size, chunk, self._pieces, prompts, clock, agree)


def load(
    spec: LoadSpec, report: Report, root: ModelRoot | None = None, shard: Shard | None = None
) -> MlxModel:
    """Loads a model; see ``Backend.load`` for arguments and errors.

    Args:
        spec: What to load.
        report: Called with the progress.
        root: Where models must lie; None is anywhere.
        shard: Leaves this rank's part of the model; None leaves all.
    """
    mx.reset_peak_memory()
    path = find_below(root, spec.model) if root else find(spec.model)
    try:
        return _load(path, spec, report, shard)
    except ModelUnsupported as fault:
        # Not every place that raises it knows the directory.
        fault.metadata.setdefault("model", str(path))
        raise


def _load(path: Path, spec: LoadSpec, report: Report, shard: Shard | None) -> MlxModel:
    require_files(path)
    config = read_config(path)
    report(1)
    model, config = _build(path, config)
    report(3)
    if shard:
        spec = shard.split(model, config, spec)
    plan = _plan(spec, model, config)
    codec, eos_token_ids = load_codec(path, config)
    report(5)
    if shard:
        shard.partners.begin_load(plan.settled(spec))
    model = _converted(path, model, config, plan.settled(spec), shard)
    _read(path, model, report)
    if shard:
        plan = plan.with_share(shard.partners.finish_load(report, plan.share))
    fit_threads(_arrays(model))
    info = _describe(spec, path, model, config, plan, eos_token_ids)
    loaded = MlxModel(model, codec, info, plan, shard)
    _warm_up(loaded)
    report(100)
    logger.info(
        "loaded %s: %s of weights as %s, context %d x %d",
        info.path,
        format_bytes(info.weight_bytes),
        info.dtype,
        info.parallel,
        info.context_length,
    )
    return loaded


def _build(path: Path, config: dict[str, Any]) -> tuple[Module, dict[str, Any]]:
    try:
        model, config = load_model(path, lazy=True)
    except Exception as error:
        problem = damage(path) or f"{type(error).__name__}: {error}"
        raise ModelUnsupported(
            f"{path} is no model that mlx_lm can build ({problem}); expected "
            f"model*.safetensors that fit config.json, whose model_type is "
            f"{config['model_type']!r}",
            model=str(path),
        ) from error
    finally:
        # Layers draw weights that nobody reads. What is left of it is a chain of unevaluated
        # states, one a layer, that would grow with each load.
        mx.eval(mx.random.state)
    return model, config


def _read(path: Path, model: Module, report: Report) -> None:
    try:
        read_weights(_arrays(model), lambda share: report(5 + int(90 * share)))
    except ModelUnsupported as fault:
        # MLX does not name the file.
        found = damage(path) or f"the files of {path} were changed while they were read"
        raise ModelUnsupported(f"{fault}; {found}", model=str(path)) from fault


@dataclass(frozen=True)
class _Plan:
    """What a load has decided before it reads any weights; see ``ModelInfo``."""

    dtype: Dtype
    probe: Probe
    max_context_length: int
    context_length: int
    limit_bytes: int
    kv_budget_bytes: int
    prefix_cache_bytes: int

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of KV cache for one sequence, in the format of the converted model."""
        return _kv_bytes(self.probe, tokens, self.dtype)

    @property
    def share(self) -> float:
        """For how many sequences of the whole context there is memory."""
        return self.kv_budget_bytes / max(1, self.kv_bytes(self.context_length))

    def with_share(self, share: float) -> _Plan:
        """The same with memory for so many sequences, which may be fewer."""
        budget = min(self.kv_budget_bytes, int(share * self.kv_bytes(self.context_length)))
        return replace(self, kv_budget_bytes=budget)

    def settled(self, spec: LoadSpec) -> LoadSpec:
        """The same load with nothing left to choose."""
        return replace(
            spec,
            dtype=self.dtype,
            context_length=self.context_length,
            prefix_cache_bytes=self.prefix_cache_bytes,
        )


def _plan(spec: LoadSpec, model: Module, config: dict[str, Any]) -> _Plan:
    limit = spec.memory_limit_bytes or free_memory().available_bytes
    longest = max_context(config)
    if spec.context_length and spec.context_length > longest:
        text = f"{spec.context_length} is more than the {longest} tokens this model can handle"
        raise InvalidField([("context_length", text)])
    context = spec.context_length or min(longest, DEFAULT_CONTEXT)
    seen = probe(model, _PREFILL_CHUNK[_device_kind()])
    dtype = spec.dtype
    if dtype is Dtype.AUTO:
        wide = _weight_need(model, Dtype.FLOAT32)
        wide += _kv_bytes(seen, context, Dtype.FLOAT32) * spec.parallel
        wide += spec.prefix_cache_bytes or 0
        on_cpu = _device_kind() == "cpu"
        dtype = Dtype.FLOAT32 if on_cpu and wide <= limit else Dtype.AS_STORED
    weights, one = _weight_need(model, dtype), _kv_bytes(seen, context, dtype)
    room = limit - weights - (spec.prefix_cache_bytes or 0)
    if one > room:
        raise _too_large(spec, weights, one, context, limit)
    prefix = spec.prefix_cache_bytes
    if prefix is None:
        prefix = max(0, room - one * spec.parallel) // _PREFIX_SHARE
    budget = min(one * spec.parallel, room)
    return _Plan(dtype, seen, longest, context, limit, budget, prefix)


def _too_large(
    spec: LoadSpec, weights: int, kv: int, context: int, limit: int
) -> InsufficientMemory:
    kept = spec.prefix_cache_bytes or 0
    need = weights + kv + kept
    parts = f"{format_bytes(weights)} weights, {format_bytes(kv)} KV cache for {context} tokens"
    if kept:
        parts += f", {format_bytes(kept)} prefix cache"
    return InsufficientMemory(
        f"the model needs {format_bytes(need)} ({parts}) and {format_bytes(limit)} may be used; "
        "free memory, or load with a smaller context_length, dtype or prefix_cache_bytes",
        requiredBytes=need,
        availableBytes=limit,
    )


def _weight_need(model: Module, dtype: Dtype) -> int:
    """Bytes of the weights if they are held as ``dtype``."""
    if dtype is Dtype.AS_STORED:
        return _weight_bytes(model)
    return _logical_count(model) * _MX_DTYPES[dtype].size


def _kv_bytes(seen: Probe, tokens: int, dtype: Dtype) -> int:
    """Bytes of the KV cache of one sequence if the weights are held as ``dtype``."""
    kv = seen.kv_bytes(tokens)
    return kv if dtype is Dtype.AS_STORED else kv * _MX_DTYPES[dtype].size // seen.item_bytes


def _logical_count(model: Module) -> int:
    """Weights, counting those by themselves that a quantized layer packs into words."""
    total = 0
    for _, module in model.named_modules():
        scales = module.get("scales")
        for name, value in module.items():
            if name == "weight" and scales is not None:
                total += scales.size * module.group_size
            elif isinstance(value, mx.array) and name not in ("scales", "biases"):
                total += value.size
    return total


def _converted(
    path: Path, model: Module, config: dict[str, Any], spec: LoadSpec, shard: Shard | None
) -> Module:
    """Changes the format of what was built, and perhaps split."""
    if shard is None or spec.dtype is Dtype.AS_STORED or not config.get("quantization"):
        return _convert(model, spec.dtype)
    # mlx_lm dequantizes whole layers only.
    model, config = _build(path, config)
    model = _convert(model, spec.dtype)
    shard.split(model, config, spec)
    return model


def _convert(model: Module, dtype: Dtype) -> Module:
    """Changes the format of lazy weights; they are converted as they are read."""
    if dtype is not Dtype.AS_STORED:
        model = dequantize_model(model)
        model.set_dtype(_MX_DTYPES[dtype])
    return model


def _describe(
    spec: LoadSpec,
    path: Path,
    model: Module,
    config: dict[str, Any],
    plan: _Plan,
    eos_token_ids: frozenset[int],
) -> ModelInfo:
    quantization = config.get("quantization") or {}
    held_quantized = plan.dtype is Dtype.AS_STORED
    return ModelInfo(
        name=path.name if Path(spec.model).expanduser().is_dir() else spec.model,
        path=str(path),
        architecture=str(config["model_type"]),
        max_context_length=plan.max_context_length,
        vocab_size=plan.probe.vocab_size,
        weight_bytes=_weight_bytes(model),
        dtype=_float_name(model),
        quantization_bits=int(quantization.get("bits", 0)) if held_quantized else 0,
        eos_token_ids=eos_token_ids,
        context_length=plan.context_length,
        parallel=spec.parallel,
        limit_bytes=plan.limit_bytes,
        kv_budget_bytes=plan.kv_budget_bytes,
        prefix_cache_bytes=plan.prefix_cache_bytes,
    )


def _warm_up(model: MlxModel) -> None:
    try:
        model.warm_up()
    except Exception as error:
        logger.exception("warm-up failed")
        raise GenerationFailed(_warm_up_advice(error)) from error


def _warm_up_advice(error: Exception) -> str:
    advice = (
        f"the loaded model raised {type(error).__name__} at its first token; the runner's log has "
        "the traceback"
    )
    if _device_kind() == "cpu":
        # Without g++ MLX does not fuse kernels; with one that fails it raises.
        advice += "; a g++ that does not work is a known cause: `mlx-runner doctor` tries it"
    return advice


def _weight_bytes(model: Module) -> int:
    return sum(value.nbytes for value in _arrays(model))


def _arrays(model: Module) -> list[mx.array]:
    flat = cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))
    return [value for _, value in flat]


def _float_name(model: Module) -> str:
    """The format most of the floating-point weights have."""
    sizes: Counter[str] = Counter()
    for value in _arrays(model):
        if mx.issubdtype(value.dtype, mx.floating):
            sizes[str(value.dtype).removeprefix("mlx.core.")] += value.size
    return sizes.most_common(1)[0][0] if sizes else ""


def _device_kind() -> str:
    return "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
