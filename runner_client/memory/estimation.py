"""What a runner needs in memory for a model, part by part, without loading it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from runner_client.errors import InvalidRequestError, ModelUnsupportedError, RunnerError
from runner_client.memory.header_need import need_from_headers
from runner_client.memory.model import find_model, read_model
from runner_common.host_memory.free import Backend, installed_backend
from runner_common.import_paths import with_import_paths
from runner_common.memory.need import MemoryNeed
from runner_common.memory.need_query import (
    NeedAnswer,
    NeedRefusedError,
    NeedRequest,
    NeedUnknownError,
    ask_need,
    can_ask,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

DType = Literal["auto", "auto_or_stored", "float32", "bfloat16", "float16", "as_stored"]

DEFAULT_PARALLEL = 4
"""How many completions a runner decodes together when it is not told."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What a runner needs with a model, every part visible.

    ``total_bytes`` is an upper bound for the whole process: its peak with every sequence at its
    full length was 0.7 to 1.0 of it where it was measured (docs/memory.md).

    Attributes:
        model: The model as asked for.
        path: Its directory.
        backend: ``"cpu"``, ``"metal"`` or ``"cuda"``.
        dtype: What the weights are converted to, or ``"as_stored"``.
        context_length: Tokens of one sequence that were assumed.
        model_context_length: What the model was made for, in tokens.
        parallel: Sequences held at once.
        file_bytes: The tensors as stored. No part of the need: a comparison.
        weight_bytes: The weights as held after the load.
        kv_bytes: KV caches and recurrent states of ``parallel`` sequences of
            ``context_length`` tokens.
        working_bytes: Arrays of a prefill chunk or a decode step, the copy of a layer's
            cache while it grows, the buffers that MLX keeps for reuse.
        process_bytes: Interpreter, libraries, tokenizer and heap.
        load_transient_bytes: What reading the files takes beyond all of the above.
        prefix_cache_bytes: The most that evaluated prompts may take.
        has_default_prefix_cache: Whether that is the default, which a runner makes smaller
            where memory is short; ``required_bytes`` does not count it.
        notes: What could not be told, and what ``Model.warnings`` will say, in words.
    """

    model: str
    path: str
    backend: Backend
    dtype: DType
    context_length: int
    model_context_length: int
    parallel: int
    file_bytes: int
    weight_bytes: int
    kv_bytes: int
    working_bytes: int
    process_bytes: int
    load_transient_bytes: int
    prefix_cache_bytes: int = 0
    has_default_prefix_cache: bool = False
    notes: tuple[str, ...] = ()

    @property
    def need(self) -> MemoryNeed:
        """The parts of the need."""
        return MemoryNeed(
            weight_bytes=self.weight_bytes,
            kv_bytes=self.kv_bytes,
            prefix_cache_bytes=self.prefix_cache_bytes,
            working_bytes=self.working_bytes,
            process_bytes=self.process_bytes,
            load_transient_bytes=self.load_transient_bytes,
            has_default_prefix_cache=self.has_default_prefix_cache,
        )

    @property
    def total_bytes(self) -> int:
        """The sum of the parts."""
        return self.need.total_bytes

    @property
    def required_bytes(self) -> int:
        """What the gate asks for: the total without a prefix cache of the default size."""
        return self.need.required_bytes

    @property
    def parts(self) -> dict[str, int]:
        """The parts of the need by name, in bytes."""
        return self.need.parts


def estimate(
    model: str,
    *,
    context_length: int | None = None,
    parallel: int = DEFAULT_PARALLEL,
    dtype: DType = "auto",
    backend: Backend | None = None,
    prefix_cache_bytes: int | None = None,
    allow_inexact: bool = False,
    env: Mapping[str, str] | None = None,
) -> MemoryEstimate:
    """Estimate the memory of a runner that hosts the model.

    A short-lived process of the server's package builds the model with unread weights and
    counts what the server itself counts before a load; the answer is cached by the identity of
    the model's files. Where that package is not installed, or for another backend than the
    installed one, the headers of the files are all there is to go by, and ``notes`` says so.

    ``dtype="auto"`` is float32 on the CPU, where it is the only fast type and packed
    weights are expanded to it, and ``"as_stored"`` elsewhere. ``"auto_or_stored"`` is
    estimated as ``"auto"``. Not measured on Metal or CUDA.

    Args:
        model: A directory, or a hub id in the local Hugging Face cache.
        context_length: Tokens of one sequence; by default what a runner uses:
            the model's own length, at most 4,096.
        parallel: Sequences held at once; by default as many as a runner takes.
        dtype: What the weights are converted to.
        backend: Where the model runs; by default what the installed MLX uses.
        prefix_cache_bytes: The most to keep evaluated prompts in; by default one sequence, or a
            quarter of all of them.
        allow_inexact: Estimate a model that cannot be computed exactly as its files say;
            ``notes`` names the differences.
        env: The environment that the runner will have; by default this process's.

    Raises:
        ModelNotFoundError: There is no such model on this machine.
        ModelUnsupportedError: Its files are incomplete or damaged, or mlx_lm cannot build it.
        InvalidRequestError: ``context_length`` is less than 2 or more than the model can
            handle, ``parallel`` is not 1 to 256, or ``prefix_cache_bytes`` is negative or
            no 64-bit number.
    """
    _require("context_length", context_length, 2, 2**31 - 1)
    _require("parallel", parallel, 1, 256)
    _require("prefix_cache_bytes", prefix_cache_bytes, 0, 2**63 - 1)
    environ = os.environ if env is None else env
    located = find_model(model, environ)
    directory = read_model(located.path)
    installed = installed_backend()
    backend = backend or installed
    request = NeedRequest(
        path=str(located.path),
        context_length=context_length,
        parallel=parallel,
        dtype=_resolved(dtype, backend),
        prefix_cache_bytes=prefix_cache_bytes,
        allow_inexact=allow_inexact,
    )
    answer, notes = _answer(request, installed == backend, environ)
    return MemoryEstimate(
        model=model,
        path=request.path,
        backend=backend,
        dtype=cast("DType", answer.dtype),
        context_length=answer.context_length,
        model_context_length=answer.model_context_length,
        parallel=answer.parallel,
        file_bytes=sum(stored.tensor.nbytes for stored in directory.tensors.values()),
        notes=(located.note, *notes) if located.note else notes,
        **answer.need.as_dict(),
    )


def _answer(
    request: NeedRequest, is_installed: bool, environ: Mapping[str, str]
) -> tuple[NeedAnswer, tuple[str, ...]]:
    """Return what the server counts, or else what the headers tell."""
    if not is_installed:
        why = "this machine's MLX does not run on that backend"
    elif not can_ask():
        why = "the server's packages are not installed here"
    else:
        try:
            answer = ask_need(request, with_import_paths(environ))
        except NeedRefusedError as refusal:
            raise _refused(refusal) from refusal
        except NeedUnknownError as error:
            why = str(error)
        else:
            return answer, answer.notes
    answer, notes = need_from_headers(request)
    return answer, (f"counted from the headers of the files: {why}", *notes)


def _refused(refusal: NeedRefusedError) -> RunnerError:
    """Return the error that a load of the model would raise."""
    text, reason, numbers = str(refusal), refusal.reason, refusal.metadata
    if reason == "INVALID_FIELD":
        return InvalidRequestError(text, field_violations=refusal.violations, reason=reason)
    if reason == "MODEL_UNSUPPORTED":
        model = numbers.get("model")
        return ModelUnsupportedError(text, model=model, reason=reason, metadata=numbers)
    return RunnerError(text, reason=reason, metadata=numbers)


def _require(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        text = f"{value:,} is not in the range {low:,} to {high:,}"
        raise InvalidRequestError(f"{name}: {text}", field_violations=[(name, text)])


def _resolved(dtype: DType, backend: Backend) -> str:
    if dtype not in ("auto", "auto_or_stored"):
        return dtype
    return "float32" if backend == "cpu" else "as_stored"
