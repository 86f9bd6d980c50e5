"""Loading of a model into memory, in steps that report progress and can be cancelled.

1. Find the directory and read its configuration; refuse a model that needs to run its own code.
2. Build the model with lazy weights. Nothing is read yet, but all sizes are known.
3. Choose the dtype of the weights, and refuse a model that does not fit the memory.
4. Read the weights in order.
5. Generate a token, which compiles the kernels, and test whether rows can be decoded together.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
from mlx.nn.layers.base import Module

from runner_common.model_directory import (
    Located,
    ModelDirectory,
)
from runner_common.units import format_bytes
from runner_server.engine.load_admission import UNCHECKED, Admission
from runner_server.engine.prefill_queue import PrefillLimits
from runner_server.engine.prefix_cache import CacheUsage, PrefixCache
from runner_server.engine.types import Dtype, LoadSpec, ModelInfo
from runner_server.errors import InsufficientMemory, ModelUnsupported
from runner_server.host.heap import trim_heap
from runner_server.host.model_root import ModelRoot
from runner_server.mlx_backend.blas_threads import fit_threads
from runner_server.mlx_backend.cache.row_caches import CachePieces
from runner_server.mlx_backend.executor import BatchBudget, MlxExecutor, MlxPrefixCache
from runner_server.mlx_backend.loading.batch_trial import try_together
from runner_server.mlx_backend.loading.building import Built, before_weights, build, read_directory
from runner_server.mlx_backend.loading.finding import find_model
from runner_server.mlx_backend.loading.reading import read_weights
from runner_server.mlx_backend.loading.trial import warm_up
from runner_server.mlx_backend.loading.weight_files import WeightFiles
from runner_server.mlx_backend.planning.measure import (
    PREFILL_CHUNK,
    ROWS_TOGETHER,
    arrays,
    device_kind,
    measure,
    weight_bytes,
)
from runner_server.mlx_backend.planning.plan import (
    Plan,
    alone_warning,
    formats,
    make_plan,
    require_context,
)
from runner_server.mlx_backend.planning.working_memory import RowsApartError
from runner_server.mlx_backend.tokenizer.codec import FastCodec, load_codec

if TYPE_CHECKING:
    from runner_server.mlx_backend.sharding import Shard

logger = logging.getLogger(__name__)

Report = Callable[[int], None]


class MlxModel:
    """Implements ``runner_server.engine.backend.LoadedModel``.

    Args:
        model: The model, with its weights in memory.
        codec: The model's tokenizer.
        info: The model's description, and the limits in force.
        plan: The plan made before reading the weights.
        shard: This rank's part of the model; None for the whole model.
    """

    def __init__(
        self,
        model: Module,
        codec: FastCodec,
        info: ModelInfo,
        plan: Plan,
        shard: Shard | None,
    ) -> None:
        self._model = model
        self._plan = plan
        self._shard = shard
        self._pieces = CachePieces.of(model)
        self._prompts: MlxPrefixCache = PrefixCache(self._pieces, info.prefix_cache_bytes)
        self.codec = codec
        self.info = info

    @property
    def kv_bytes(self) -> Callable[[int], int]:
        """Function from tokens to bytes; see ``LoadedModel.kv_bytes``."""
        return self._plan.kv_bytes

    @property
    def prompts(self) -> CacheUsage:
        """Byte counters of the prefix cache."""
        return self._prompts.usage

    def limit_prefix_cache(self, limit_bytes: int) -> None:
        """Change the byte budget of the prefix cache; see ``LoadedModel.limit_prefix_cache``."""
        self._prompts.limit(limit_bytes)

    @property
    def prefill_limits(self) -> PrefillLimits:
        """Limits of prefill chunks; see ``LoadedModel.prefill_limits``."""
        chunk = PREFILL_CHUNK[device_kind()]
        return PrefillLimits(
            max_chunk=chunk,
            max_tokens=ROWS_TOGETHER * chunk,
            can_pad=self._pieces.can_pad,
            needs_snapshot=self._pieces.needs_snapshot,
            max_prompts=self._budget.max_prompts_together,
        )

    def new_executor(self) -> MlxExecutor:
        """Return an executor without rows."""
        return self._executor(self._prompts)

    def warm_up(self) -> None:
        """Generate a token, and set ``parallel`` to 1 if rows cannot be decoded together.

        Also compiles the kernels, for which the first request would have to wait.

        Raises:
            RunnerFault: See :func:`~runner_server.mlx_backend.loading.trial.warm_up`.
        """
        info = self.info
        executor = self._executor(PrefixCache(self._pieces, 0))
        warm_up(self._model, executor, info.vocab_size, info.dtype)
        if info.parallel == 1 or self._shard:
            return
        if why := try_together(self._model, self._pieces, info.vocab_size, info.parallel):
            warning = alone_warning(info.architecture, why)
            logger.warning("%s: %s", info.path, warning)
            self.info = replace(info, parallel=1, warnings=(*info.warnings, warning))

    def _executor(self, prompts: MlxPrefixCache) -> MlxExecutor:
        agree = self._shard.agree if self._shard else None
        return MlxExecutor(
            self._model,
            self.info.vocab_size,
            self._pieces,
            prompts,
            agree=agree,
            budget=self._budget,
        )

    @property
    def _budget(self) -> BatchBudget:
        plan = self._plan
        return BatchBudget(
            self.info.kv_budget_bytes, plan.need.working_bytes, plan.kv_bytes, plan.chunk_bytes
        )


def load(
    spec: LoadSpec,
    report: Report,
    root: ModelRoot | None = None,
    shard: Shard | None = None,
    admission: Admission = UNCHECKED,
) -> MlxModel:
    """Load a model; see ``Backend.load``, also for the errors.

    Args:
        spec: The load.
        report: Called with the progress, 0 to 100.
        root: The directory that models must be below; None allows any.
        shard: Selects this rank's part of the model; None for the whole model.
        admission: Decides whether there is enough memory.
    """
    mx.reset_peak_memory()
    located = find_model(spec.model, root)
    try:
        return _load(located, spec, report, shard, admission)
    except ModelUnsupported as fault:
        # Most code that raises this error has no access to the directory.
        fault.metadata.setdefault("model", str(located.path))
        raise


def _load(
    located: Located, spec: LoadSpec, report: Report, shard: Shard | None, admission: Admission
) -> MlxModel:
    directory = read_directory(located)
    report(1)
    with before_weights(directory.path):
        codec, eos_token_ids = _codec(directory)
        # Reading a tokenizer takes up to five times the memory that it keeps: of Gemma 3's 356 MiB,
        # 260 are freed.
        trim_heap()
        report(3)
        built, plan = _planned(directory, spec, shard, admission)
    report(5)
    if shard:
        shard.partners.begin_load(plan.settled(spec))
    _read(directory.path, built.model, report)
    if shard:
        plan = plan.with_share(shard.partners.finish_load(report, plan.share))
    fit_threads(arrays(built.model))
    info = _describe(spec, located, built, plan, eos_token_ids)
    mx.set_cache_limit(plan.buffer_cache_bytes)
    # Above this limit, MLX waits for results before it allocates more.
    mx.set_memory_limit(plan.limit_bytes)
    loaded = MlxModel(built.model, codec, info, plan, shard)
    loaded.warm_up()
    report(100)
    logger.info(
        "loaded %s: %s of weights as %s, context %d x %d",
        info.path,
        format_bytes(info.weight_bytes),
        info.dtype,
        info.parallel,
        info.context_length,
    )
    for warning in info.warnings:
        logger.warning("%s: %s", info.path, warning)
    return loaded


def check_files(spec: LoadSpec, root: ModelRoot | None = None) -> None:
    """Check that a model's files allow the load; see ``Backend.check``."""
    directory = read_directory(find_model(spec.model, root))
    if spec.context_length is not None:
        require_context(spec.context_length, directory.configuration.context_length)


def plan_load(path: Path, spec: LoadSpec) -> Plan:
    """Return the plan of a load, without reading weights or reserving memory.

    Args:
        path: The model's directory.
        spec: The load.

    Raises:
        RunnerFault: As for :func:`load`.
    """
    directory = read_directory(Located(path))
    with before_weights(path):
        # Read before planning, because a transformers import adds to the process's memory.
        _codec(directory)
        return _planned(directory, spec, None, UNCHECKED)[1]


def _codec(directory: ModelDirectory) -> tuple[FastCodec, frozenset[int]]:
    return load_codec(directory.path, directory.configuration.values)


def _planned(
    directory: ModelDirectory, spec: LoadSpec, shard: Shard | None, admission: Admission
) -> tuple[Built, Plan]:
    """Build the model in the first dtype that fits the memory, without reading weights."""
    *preferred, last = formats(spec.dtype, device_kind())
    for dtype in preferred:
        try:
            return _admitted(directory, replace(spec, dtype=dtype), shard, admission)
        except InsufficientMemory as fault:
            logger.warning(
                "%s; %s is loaded as it is stored, which is slow on a CPU", fault, directory.path
            )
    return _admitted(directory, replace(spec, dtype=last), shard, admission)


def _admitted(
    directory: ModelDirectory, spec: LoadSpec, shard: Shard | None, admission: Admission
) -> tuple[Built, Plan]:
    """Build the model in one dtype, and reserve the memory.

    Raises:
        InsufficientMemory: The model does not fit.
    """
    built = build(directory, spec, shard)
    plan = _plan(directory, built)
    granted = admission.admit(str(directory.path), plan.need, override=spec.memory_override)
    # Build it again, because some models keep arrays of their last run, here unevaluated ones.
    return build(directory, spec, shard), plan.within(granted)


def _plan(directory: ModelDirectory, built: Built) -> Plan:
    """Plan a load, for one request at a time if the model does not support batches.

    Raises:
        InsufficientMemory: ``memory_limit_bytes`` is too small for one sequence.
        ModelUnsupported: The model cannot run.
    """
    try:
        return _plan_rows(directory, built, built.spec)
    except RowsApartError as why:
        warning = alone_warning(directory.configuration.model_type, str(why))
    plan = _plan_rows(directory, built, replace(built.spec, parallel=1))
    return replace(plan, warnings=(*plan.warnings, warning))


def _plan_rows(directory: ModelDirectory, built: Built, spec: LoadSpec) -> Plan:
    sizes = measure(built.model, directory, built.context_length, spec.parallel)
    return make_plan(spec, sizes, directory.configuration.context_length, built.warnings)


def _read(path: Path, model: Module, report: Report) -> None:
    files = WeightFiles.of(model)
    try:
        read_weights(arrays(model), lambda share: report(5 + int(90 * share)), files)
    except ModelUnsupported as fault:
        if fault.metadata:
            raise
        # MLX's error does not name the file.
        text = f"{fault}; the files of {path} were changed while they were read"
        raise ModelUnsupported(text, model=str(path)) from fault
    # Arrays that are not parameters, such as the frequencies of rotary embeddings.
    mx.eval([list(module.values()) for _, module in model.named_modules()])
    files.check()


def _describe(
    spec: LoadSpec, located: Located, built: Built, plan: Plan, eos_token_ids: frozenset[int]
) -> ModelInfo:
    model, config, path = built.model, built.config, located.path
    quantization = config.get("quantization") or {}
    held_quantized = plan.dtype is Dtype.AS_STORED
    return ModelInfo(
        name=spec.model if located.is_hub_id else path.name,
        path=str(path),
        architecture=str(config["model_type"]),
        max_context_length=plan.max_context_length,
        vocab_size=plan.probe.vocab_size,
        weight_bytes=weight_bytes(model),
        dtype=_float_name(model),
        quantization_bits=int(quantization.get("bits", 0)) if held_quantized else 0,
        eos_token_ids=eos_token_ids,
        context_length=plan.context_length,
        parallel=plan.parallel,
        limit_bytes=plan.limit_bytes,
        kv_budget_bytes=plan.kv_budget_bytes,
        prefix_cache_bytes=plan.need.prefix_cache_bytes,
        reserved_bytes=plan.need.total_bytes,
        dtype_fallback=plan.dtype is not formats(spec.dtype, device_kind())[0],
        warnings=plan.warnings,
    )


def _float_name(model: Module) -> str:
    """Return the most common dtype of the floating-point weights."""
    sizes: Counter[str] = Counter()
    for value in arrays(model):
        if mx.issubdtype(value.dtype, mx.floating):
            sizes[str(value.dtype).removeprefix("mlx.core.")] += value.size
    return sizes.most_common(1)[0][0] if sizes else ""
