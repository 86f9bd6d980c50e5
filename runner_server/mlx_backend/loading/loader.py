"""Loading of a model into memory, in steps that report progress and can be cancelled.

1. Find the directory and read its configuration; refuse a model that needs to run its own code.
2. Read the tokenizer.
3. Build the model with lazy weights and plan the load. Nothing is read yet, but all sizes are
   known.
4. Admit the plan, which reserves its memory, or refuse a model that does not fit. Where several
   dtypes are allowed, steps 3 and 4 are repeated for the next one.
5. Read the weights in order.
6. Try the model: generate a token, which compiles the kernels, and test whether rows can be decoded
   together.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
from mlx.nn.layers.base import Module

from runner_common.model_directory import Located, ModelDirectory
from runner_common.units import format_bytes
from runner_server.chat.format import ChatFormat
from runner_server.engine.adapters import AdapterInfo
from runner_server.engine.load_admission import UNCHECKED, Admission
from runner_server.engine.prefix_disk import BUFFERED_TOKENS, PrefixDiskSettings
from runner_server.engine.types import Dtype, LoadSpec, ModelInfo
from runner_server.errors import InsufficientMemory, ModelUnsupported
from runner_server.host.heap import trim_heap
from runner_server.host.model_root import ModelRoot
from runner_server.mlx_backend.blas_threads import fit_threads
from runner_server.mlx_backend.loading.building import Built, before_weights, build, read_directory
from runner_server.mlx_backend.loading.draft_model import DraftFiles, PlannedDraft
from runner_server.mlx_backend.loading.finding import NamedAdapter, find_adapters, find_model
from runner_server.mlx_backend.loading.mlx_model import MlxModel
from runner_server.mlx_backend.loading.model_digest import DigestedFiles
from runner_server.mlx_backend.loading.prefix_disk import PrefixDisk
from runner_server.mlx_backend.loading.reading import read_files
from runner_server.mlx_backend.planning.measure import arrays, device_kind, measure, weight_bytes
from runner_server.mlx_backend.planning.plan import (
    Plan,
    alone_warning,
    formats,
    make_plan,
    require_context,
)
from runner_server.mlx_backend.planning.working_memory import RowsApartError
from runner_server.mlx_backend.tokenizer.chat_templates import read_chat_format
from runner_server.mlx_backend.tokenizer.codec import FastCodec, load_codec

if TYPE_CHECKING:
    from runner_server.mlx_backend.sharding import Shard

logger = logging.getLogger(__name__)

Report = Callable[[int], None]


def load(
    spec: LoadSpec,
    report: Report,
    root: ModelRoot | None = None,
    shard: Shard | None = None,
    admission: Admission = UNCHECKED,
    disk: PrefixDiskSettings | None = None,
) -> MlxModel:
    """Load a model; see ``Backend.load``, also for the errors.

    Args:
        spec: The load.
        report: Called with the progress, 0 to 100.
        root: The directory that models must be below; None allows any.
        shard: Selects this rank's part of the model; None for the whole model.
        admission: Decides whether there is enough memory.
        disk: The prefix cache on disk; None for a model without one.
    """
    mx.reset_peak_memory()
    located = find_model(spec.model, root)
    with _named_in_faults(located.path):
        directory = read_directory(located)
        adapters = _Adapters(spec, root)
        report(1)
        prefix_disk = PrefixDisk(disk, directory) if disk else None
        with before_weights(directory.path):
            codec, eos_token_ids = _read_tokenizer(directory)
            draft_files = _find_draft(spec, root, codec)
            report(3)
            transit_tokens = BUFFERED_TOKENS if disk else 0
            plan = _plan_and_admit(directory, draft_files, spec, shard, admission, transit_tokens)
            # Build it again, because some models keep arrays of their last run, here unevaluated.
            built = build(directory, replace(spec, dtype=plan.dtype), shard)
            draft = PlannedDraft.of(draft_files, built).rebuilt() if draft_files else None
        report(5)
        share = _share(built, draft)
        plan = _read(directory.path, built, plan, shard, report, share)
        info = _describe(spec, located, built, plan, eos_token_ids)
        info = replace(info, chat=_read_chat_format(directory, codec))
        info = replace(info, completes=directory.configuration.has_output_layer)
        info = replace(info, adapters=adapters.describe(lambda: report(95)))
        model = MlxModel(built.model, codec, info, plan, shard, directory, built.adapters)
        if draft:
            draft_model = draft.read(_part(report, share, 1), info.vocab_size)
            model.use_draft_model(draft_model, draft.info)
        _try(model, plan)
        if draft:
            model.require_drafts()
        report(99 if prefix_disk else 100)
        if prefix_disk:
            # Last, because a fault after it would leave the threads of the disk behind.
            prefix_disk.attach(model, built.model, plan, lambda: report(99))
    _log(model.info)
    return model


class _Adapters:
    """The files of a load's adapters.

    Create it before the tensors are read, so that a file that changes meanwhile is noticed.

    Args:
        spec: The load.
        root: The directory that adapters must be below; None allows any.

    Raises:
        InvalidField: A directory does not exist.
        ModelUnsupported: The files of an adapter cannot be used.
    """

    def __init__(self, spec: LoadSpec, root: ModelRoot | None) -> None:
        self._found = find_adapters(spec.adapters, root)
        self._files = [DigestedFiles(each.files.files) for each in self._found]

    def describe(self, beat: Callable[[], object]) -> tuple[AdapterInfo, ...]:
        """Return the descriptions of the adapters, after their tensors were read.

        Args:
            beat: Called while the files are read once more, for their digests.

        Raises:
            ModelUnsupported: A file was changed during the load.
        """
        digests = [files.digest(None, beat) for files in self._files]
        return tuple(map(self._describe, self._found, digests))

    @staticmethod
    def _describe(adapter: NamedAdapter, digest: str | None) -> AdapterInfo:
        path = adapter.files.path
        if digest is None:
            raise ModelUnsupported(
                f"the files of the adapter {adapter.name!r} in {path} were changed during the load"
            )
        return AdapterInfo(adapter.name, str(path), digest)


def plan_load(path: Path, spec: LoadSpec) -> Plan:
    """Return the plan of a load, without reading weights or reserving memory.

    Args:
        path: The model's directory.
        spec: The load.

    Raises:
        RunnerFault: As for :func:`load`.
    """
    directory = read_directory(Located(path))
    with before_weights(directory.path):
        # Read before planning, because a transformers import adds to the process's memory.
        codec, _ = _read_tokenizer(directory)
        return _plan_and_admit(directory, _find_draft(spec, None, codec), spec, None, UNCHECKED)


def check_files(spec: LoadSpec, root: ModelRoot | None = None) -> None:
    """Check that a model's files allow the load; see ``Backend.check``."""
    directory = read_directory(find_model(spec.model, root))
    find_adapters(spec.adapters, root)
    if spec.context_length is not None:
        require_context(spec.context_length, directory.configuration.context_length)
    DraftFiles.find(spec, root)


def _find_draft(spec: LoadSpec, root: ModelRoot | None, codec: FastCodec) -> DraftFiles | None:
    """Return the files of the draft model, which has the tokens of a codec; None without one."""
    files = DraftFiles.find(spec, root)
    if files:
        with _named_in_faults(files.directory.path):
            files.require_tokens_of(codec)
        # As after the tokenizer of the model.
        trim_heap()
    return files


@contextmanager
def _named_in_faults(path: Path) -> Iterator[None]:
    """Add the model's directory to ``ModelUnsupported``, which most code raises without it."""
    try:
        yield
    except ModelUnsupported as fault:
        fault.metadata.setdefault("model", str(path))
        raise


def _read_tokenizer(directory: ModelDirectory) -> tuple[FastCodec, frozenset[int]]:
    """Return the tokenizer, and the ids of the tokens that end a text."""
    tokenizer = load_codec(directory.path, directory.configuration.values)
    # Reading a tokenizer takes up to five times the memory that it keeps: of Gemma 3's 356 MiB,
    # 260 are freed.
    trim_heap()
    return tokenizer


def _read_chat_format(directory: ModelDirectory, codec: FastCodec) -> ChatFormat:
    """Return the chat format. Templates that cannot be used do not keep a model from loading."""
    chat = read_chat_format(directory.path, directory.configuration.values, codec.has_token)
    if chat.problem:
        logger.warning("%s; Chat is refused", chat.problem)
    return chat


def _plan_and_admit(
    directory: ModelDirectory,
    draft: DraftFiles | None,
    spec: LoadSpec,
    shard: Shard | None,
    admission: Admission,
    transit_tokens: int = 0,
) -> Plan:
    """Plan a load in the first of its dtypes that is admitted.

    Raises:
        InsufficientMemory: The model fits in no dtype.
    """
    *preferred, last = (replace(spec, dtype=dtype) for dtype in formats(spec.dtype, device_kind()))
    for choice in preferred:
        try:
            plan = _build_and_plan(directory, draft, choice, shard, transit_tokens)
            return _admit(plan, directory, spec, admission)
        except InsufficientMemory as fault:
            logger.warning(
                "%s; %s is loaded as it is stored, which is slow on a CPU", fault, directory.path
            )
    plan = _build_and_plan(directory, draft, last, shard, transit_tokens)
    return _admit(plan, directory, spec, admission)


def _build_and_plan(
    directory: ModelDirectory,
    draft_files: DraftFiles | None,
    spec: LoadSpec,
    shard: Shard | None,
    transit_tokens: int,
) -> Plan:
    """Plan a load in one dtype, for one request at a time if the model does not support batches.

    Raises:
        InsufficientMemory: ``memory_limit_bytes`` is too small for one sequence.
    """
    built = build(directory, spec, shard)
    draft = PlannedDraft.of(draft_files, built).plan if draft_files else None
    try:
        plan = _plan(directory, built, built.spec, transit_tokens, draft)
    except RowsApartError as why:
        warning = alone_warning(directory.configuration.model_type, str(why))
        plan = _plan(directory, built, replace(built.spec, parallel=1), transit_tokens, draft)
        plan = replace(plan, warnings=(*plan.warnings, warning))
    return plan.with_draft(draft) if draft else plan


def _plan(
    directory: ModelDirectory, built: Built, spec: LoadSpec, transit_tokens: int, draft: Plan | None
) -> Plan:
    with built.adapters.any_mixture():
        sizes = measure(built.model, directory, built.context_length, spec.parallel)
    longest = directory.configuration.context_length
    draft_bytes = draft.need.mlx_bytes if draft else 0
    return make_plan(spec, sizes, longest, built.warnings, transit_tokens, draft_bytes)


def _admit(plan: Plan, directory: ModelDirectory, spec: LoadSpec, admission: Admission) -> Plan:
    """Reserve the memory of a plan; return the plan within what was granted.

    Raises:
        InsufficientMemory: The model does not fit.
    """
    granted = admission.admit(str(directory.path), plan.need, override=spec.memory_override)
    return plan.within(granted)


def _share(target: Built, draft: PlannedDraft | None) -> float:
    """Return the target's share of all weights."""
    own = weight_bytes(target.model)
    return own / (own + weight_bytes(draft.built.model)) if draft else 1.0


def _part(report: Report, begin: float, end: float) -> Callable[[float], None]:
    """Return a reporter of the progress within a part of the weights, 0 to 1."""
    return lambda share: report(5 + int(90 * (begin + (end - begin) * share)))


def _read(
    path: Path, built: Built, plan: Plan, shard: Shard | None, report: Report, share: float
) -> Plan:
    """Read the weights, on all ranks; return the plan with the smallest KV budget of any rank.

    Args:
        path: The model's directory.
        built: The model.
        plan: The plan of the load.
        shard: Selects this rank's part of the model; None for the whole model.
        report: Called with the progress, 0 to 100.
        share: Share of all weights that are read here.
    """
    if shard:
        shard.partners.begin_load(plan.settled(built.spec))
    read_files(path, built.model, _part(report, 0, share))
    if shard:
        plan = plan.with_share(shard.partners.finish_load(report, plan.share))
    fit_threads(arrays(built.model))
    return plan


def _try(model: MlxModel, plan: Plan) -> None:
    """Set MLX's limits, generate a token and test whether rows can be decoded together."""
    mx.set_cache_limit(plan.buffer_cache_bytes)
    # Above this limit, MLX waits for results before it allocates more.
    mx.set_memory_limit(plan.limit_bytes)
    model.warm_up()


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
        kv_bits=built.spec.kv_bits,
    )


def _float_name(model: Module) -> str:
    """Return the most common dtype of the floating-point weights."""
    sizes: Counter[str] = Counter()
    for value in arrays(model):
        if mx.issubdtype(value.dtype, mx.floating):
            sizes[str(value.dtype).removeprefix("mlx.core.")] += value.size
    return sizes.most_common(1)[0][0] if sizes else ""


def _log(info: ModelInfo) -> None:
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
