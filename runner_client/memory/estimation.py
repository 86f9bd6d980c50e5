"""Estimate of a runner's memory for a model, without loading the model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack, cast, get_args

from runner_client.checks import check_choice, check_model
from runner_client.errors import (
    InsufficientMemoryError,
    InvalidRequestError,
    ModelUnsupportedError,
    RunnerError,
)
from runner_client.host.environment import child_environment
from runner_client.memory.header_need import need_from_headers
from runner_client.memory.model import find_model, read_model
from runner_client.types import LoadOptions
from runner_common.contract import DEFAULT_PARALLEL
from runner_common.host_memory.free import Backend, installed_backend
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

    from runner_client.types import Dtype, LoadKeywords


BARE_PROCESS_BYTES = 102 * 1024**2
"""Memory of a runner without a model: Python, gRPC and MLX, as a runner's plan counts them.

Measured on an AMD EPYC: 63 MiB resident with OpenBLAS. MKL takes up to 30 more. Not measured on
Metal or CUDA."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Memory needed by a runner with a model, in bytes, broken down into parts.

    ``total_bytes`` is an upper bound for the whole process. Measured peaks with every sequence at
    full length were 0.7 to 1.0 of it (docs/memory.md).

    Attributes:
        model: The model as requested.
        path: The model's directory.
        backend: ``"cpu"``, ``"metal"`` or ``"cuda"``.
        dtype: The format that the weights are converted to, or ``"as_stored"``.
        context_length: The assumed length of a sequence, in tokens.
        model_context_length: The model's own limit, in tokens.
        parallel: The assumed number of sequences.
        file_bytes: The tensors as stored; for comparison, not part of the need.
        weight_bytes: The weights as held after the load, with those of a draft model.
        kv_bytes: KV caches and recurrent states of ``parallel`` sequences of
            ``context_length`` tokens, and of one sequence of a draft model.
        working_bytes: Working memory: arrays of a prefill chunk or a decode step, the copy of a
            layer's cache while it grows, and the buffers that MLX keeps for reuse.
        process_bytes: Interpreter, libraries, tokenizer and heap.
        load_transient_bytes: Memory needed only while the files are read, on top of the other
            parts.
        prefix_cache_bytes: The upper limit of the prefix cache.
        has_default_prefix_cache: Whether the prefix cache has its default size, which a runner
            shrinks if memory is short; ``required_bytes`` then excludes it.
        notes: Caveats of the estimate, and warnings that the loaded model would have.
    """

    model: str
    path: str
    backend: Backend
    dtype: Dtype
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
        """Memory required by the gate: the total without a prefix cache of the default size."""
        return self.need.required_bytes

    @property
    def parts(self) -> dict[str, int]:
        """The parts of the need by name, in bytes."""
        return self.need.parts


def estimate(
    model: str,
    *,
    options: LoadOptions | None = None,
    backend: Backend | None = None,
    env: Mapping[str, str] | None = None,
    blas: str = "auto",
    **keywords: Unpack[LoadKeywords],
) -> MemoryEstimate:
    """Estimate the memory needed by a runner with a model.

    A short-lived process of the server's package builds the model with unread weights and
    computes the need as the server does before a load. The result is cached by the identity of
    the model's files. If that package is not installed, or for a backend other than the installed
    one, the estimate uses only the headers of the files, and ``notes`` says so.

    ``dtype="auto"`` is float32 on the CPU, the only fast format there, with quantized weights
    dequantized, and ``"as_stored"`` on other backends. ``"auto_or_stored"`` is estimated as
    ``"auto"``. Not measured on Metal or CUDA.

    Args:
        model: A directory, or a hub id in the local Hugging Face cache.
        options: Options of the load.
        backend: The backend that the model runs on. Default: that of the installed MLX.
        env: The runner's environment. Default: that of this process.
        blas: The BLAS library of the runner, as for ``RunnerProcess``; MKL takes 30 MiB more than
            OpenBLAS.
        keywords: Fields of ``LoadOptions``, in place of those of ``options``.

    Raises:
        ModelNotFoundError: The model does not exist on this machine.
        ModelUnsupportedError: The model's files are incomplete or damaged, or mlx_lm cannot
            build it.
        InvalidRequestError: ``context_length`` is less than 2 or more than the model supports,
            ``parallel`` is not in 1 to 256, a size is not a 64-bit number, or ``backend`` or
            ``dtype`` is unknown.
        TypeError: An argument is of the wrong type.
        InsufficientMemoryError: One sequence does not fit ``memory_limit_bytes``.
    """
    load = LoadOptions.of(options, keywords)
    check_model(model)
    environ = os.environ if env is None else env
    located = find_model(model, environ)
    directory = read_model(located.path)
    installed = installed_backend()
    backend = backend or installed
    check_choice("backend", backend, get_args(Backend))
    draft_path = str(find_model(load.draft_model, environ).path) if load.draft_model else ""
    request = _need_request(str(located.path), draft_path, load, backend)
    is_installed = installed == backend
    if is_installed:
        environ = child_environment(environ, backend=backend, blas=blas)
    answer, notes = _answer(request, is_installed, environ)
    return MemoryEstimate(
        model=model,
        path=request.path,
        backend=backend,
        dtype=cast("Dtype", answer.dtype),
        context_length=answer.context_length,
        model_context_length=answer.model_context_length,
        parallel=answer.parallel,
        file_bytes=sum(stored.tensor.nbytes for stored in directory.tensors.values()),
        notes=(located.note, *notes) if located.note else notes,
        **answer.need.as_dict(),
    )


def estimate_bare() -> MemoryEstimate:
    """Return the estimate of a runner without a model."""
    name = "a process without a model"
    return MemoryEstimate(
        model=name,
        path=name,
        backend=installed_backend(),
        dtype="auto",
        context_length=0,
        model_context_length=0,
        parallel=0,
        file_bytes=0,
        weight_bytes=0,
        kv_bytes=0,
        working_bytes=0,
        process_bytes=BARE_PROCESS_BYTES,
        load_transient_bytes=0,
    )


def _need_request(path: str, draft_path: str, load: LoadOptions, backend: Backend) -> NeedRequest:
    return NeedRequest(
        path=path,
        context_length=load.context_length,
        parallel=DEFAULT_PARALLEL if load.parallel is None else load.parallel,
        dtype=_resolved(load.dtype, backend),
        memory_limit_bytes=load.memory_limit_bytes,
        prefix_cache_bytes=load.prefix_cache_bytes,
        allow_inexact=load.allow_inexact,
        kv_bits=load.kv_bits,
        adapters=tuple(load.adapters.items()),
        draft_path=draft_path,
    )


def _answer(
    request: NeedRequest, is_installed: bool, environ: Mapping[str, str]
) -> tuple[NeedAnswer, tuple[str, ...]]:
    """Return the server's plan, or a fallback computed from the headers."""
    if not is_installed:
        why = "this machine's MLX does not run on that backend"
    elif not can_ask():
        why = "the server's packages are not installed here"
    else:
        try:
            answer = ask_need(request, environ)
        except NeedRefusedError as refusal:
            raise _refused(refusal) from refusal
        except NeedUnknownError as error:
            why = str(error)
        else:
            return answer, answer.notes
    answer, notes = need_from_headers(request)
    return answer, (f"computed from the headers of the files: {why}", *notes)


def _refused(refusal: NeedRefusedError) -> RunnerError:
    """Return the error for a refused estimate, as raised by a load of the model."""
    text, reason, numbers = str(refusal), refusal.reason, refusal.metadata
    if reason == "INVALID_FIELD":
        return InvalidRequestError(text, field_violations=refusal.violations, reason=reason)
    if reason == "MODEL_UNSUPPORTED":
        model = numbers.get("model")
        return ModelUnsupportedError(text, model=model, reason=reason, metadata=numbers)
    if reason == "INSUFFICIENT_MEMORY":
        return InsufficientMemoryError(
            text,
            required_bytes=int(numbers["requiredBytes"]),
            available_bytes=int(numbers["availableBytes"]),
            reason=reason,
            metadata=numbers,
        )
    return RunnerError(text, reason=reason, metadata=numbers)


def _resolved(dtype: Dtype, backend: Backend) -> str:
    if dtype not in ("auto", "auto_or_stored"):
        return dtype
    return "float32" if backend == "cpu" else "as_stored"
