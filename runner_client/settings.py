"""Settings of loads and clients: load options, timeouts, TLS files and the restart policy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Literal, TypedDict, get_args

from runner_client.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_kind,
    check_model,
    check_names,
    check_number,
)
from runner_common.contract import (
    KV_BITS,
    MAX_BYTES,
    MAX_CONTEXT_LENGTH,
    MAX_PARALLEL,
    MIN_CONTEXT_LENGTH,
)

if TYPE_CHECKING:
    from os import PathLike

_GIB = 2**30
_CLOSE_BYTES_PER_SECOND = 4 * _GIB

Dtype = Literal["auto", "auto_or_stored", "as_stored", "float32", "bfloat16", "float16"]
"""The number format of the weights in memory.

``"auto"`` is float32 on a CPU, the only fast format there, and as stored on other devices.
``"auto_or_stored"`` is ``"auto"`` if that fits into memory and otherwise as stored, which
is many times slower on a CPU; ``Model.dtype_fallback`` reports the fallback. The other
values name the format; quantized weights stay quantized only with ``"as_stored"``."""


class LoadKeywords(TypedDict, total=False):
    """The fields of ``LoadOptions`` as keywords of the calls that load or estimate a model."""

    context_length: int | None
    parallel: int | None
    dtype: Dtype
    memory_limit_bytes: int | None
    prefix_cache_bytes: int | None
    memory_override: bool
    allow_inexact: bool
    kv_bits: int
    adapters: Mapping[str, str]
    draft_model: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Options of a load, and of its estimate. None selects the server's default.

    Raises:
        TypeError: A value is of the wrong type.
        InvalidRequestError: A value is out of range, or the number format is unknown.
    """

    context_length: int | None = None
    """The longest sequence, in tokens. Default: the model's own limit, at most 4,096."""
    parallel: int | None = None
    """The maximum number of completions decoded together. Default: 4."""
    dtype: Dtype = "auto"
    """The number format of the weights in memory. ``"auto"`` refuses a model that does not fit;
    ``"auto_or_stored"`` then keeps the weights as stored."""
    memory_limit_bytes: int | None = None
    """The upper limit of MLX's memory. Default: the estimated need, or no limit for an estimate."""
    prefix_cache_bytes: int | None = None
    """The upper limit of the prefix cache, within ``memory_limit_bytes``; 0 disables the cache.
    Default: the KV cache of one sequence, or a quarter of the KV cache of all sequences if larger;
    less if memory is short."""
    memory_override: bool = False
    """Load the model even if the estimate does not fit into memory. The system may then kill the
    process when memory runs out. Has no effect on an estimate."""
    allow_inexact: bool = False
    """Load the model even if it cannot be computed exactly as its files specify;
    ``Model.warnings`` lists the differences."""
    kv_bits: int = 0
    """Bits of each number in the KV caches, 4 or 8; 0 keeps the number format of the weights."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """LoRA and DoRA adapters to load with the model: directories on the runner's machine, by the
    names for ``adapter`` of requests. Default: none."""
    draft_model: str | None = None
    """A small model with the same tokens, named like the model, whose guesses at the next tokens of
    a completion that is alone are checked several at a time. It changes the speed and not the text,
    and turns itself off where it does not pay. Its memory counts."""

    def __post_init__(self) -> None:
        check_integer("context_length", self.context_length, MIN_CONTEXT_LENGTH, MAX_CONTEXT_LENGTH)
        check_integer("parallel", self.parallel, 1, MAX_PARALLEL)
        check_integer("memory_limit_bytes", self.memory_limit_bytes, 1, MAX_BYTES)
        check_integer("prefix_cache_bytes", self.prefix_cache_bytes, 0, MAX_BYTES)
        check_flag("memory_override", self.memory_override)
        check_flag("allow_inexact", self.allow_inexact)
        check_choice("dtype", self.dtype, get_args(Dtype))
        check_integer("kv_bits", self.kv_bits)
        check_choice("kv_bits", self.kv_bits, KV_BITS)
        check_names("adapters", self.adapters)
        if self.draft_model is not None:
            check_model(self.draft_model, "draft_model")

    @classmethod
    def of(cls, options: LoadOptions | None, keywords: LoadKeywords) -> LoadOptions:
        """Combine the options and keywords of a call; the keywords take precedence.

        Raises:
            TypeError: The options are not ``LoadOptions``, or a value is of the wrong type.
            InvalidRequestError: A value is out of range.
        """
        check_kind("options", options, cls)
        return replace(options or cls(), **keywords)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Timeouts of a client, in seconds. None, where the type allows None, waits indefinitely.

    Raises:
        TypeError: A value is not a number.
        ValueError: A value is not above 0.
    """

    start_seconds: float | None = 60.0
    """Time from the start of a child to its ready line and first healthy response."""
    load_seconds: float | None = 300.0
    """The longest time that a load may go without progress. A load that makes progress has no
    limit."""
    first_token_seconds: float | None = 600.0
    """Time from the call of a completion to its first token, queueing and prefill included."""
    idle_seconds: float | None = 60.0
    """Time between two messages of a stream, progress messages included."""
    call_seconds: float = 30.0
    """The deadline of every other call."""
    close_seconds: float = 7.0
    """Time from the request to stop until the child is killed; large models get more. The server
    drains for up to 5.5 s."""
    stall_seconds: float | None = None
    """The longest time that a child's engine may have work but make no progress; the child is then
    killed. None never kills. A step takes tenths of a second, or
    seconds if kernels are compiled first; a slow prompt makes progress with every step."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            check_number(each.name, value)
            is_optional = each.name not in ("call_seconds", "close_seconds")
            if value is None and is_optional:
                continue
            if value is None or not 0 < value < math.inf:
                none = " (or None: no limit)" if is_optional else ""
                raise ValueError(f"{each.name} must be above 0{none}, not {value}")

    def close_grace_seconds(self, model_bytes: int) -> float:
        """Return the grace time of a child between the request to stop and the kill, in seconds.

        ``close_seconds`` plus one second per 4 GiB, because freeing memory takes time in
        proportion to its size. On macOS, killing a process that still holds wired memory can
        strand that memory until a reboot.

        Args:
            model_bytes: Memory held by the child.
        """
        return self.close_seconds + model_bytes / _CLOSE_BYTES_PER_SECOND


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for an encrypted connection, read when the client is created.

    Raises:
        ValueError: Only one of ``cert`` and ``key`` is given.
    """

    ca: str | PathLike[str] | None = None
    """Certificate authorities to trust for the server's certificate. None trusts gRPC's default
    roots."""
    cert: str | PathLike[str] | None = None
    """The client's own certificate, if the server asks for one."""
    key: str | PathLike[str] | None = None
    """The private key of ``cert``."""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("a client's certificate needs its key: give both of cert and key")


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Limit on the restarts of a child, enforced by ``RunnerProcess.restart``.

    Raises:
        TypeError: A value is not a number.
        ValueError: A value is out of range.
    """

    max_restarts: int = 3
    """The maximum number of restarts within the window; 0 allows none."""
    window_seconds: float = 600.0
    """How long a restart counts towards the maximum."""

    def __post_init__(self) -> None:
        check_integer("max_restarts", self.max_restarts)
        check_number("window_seconds", self.window_seconds)
        if self.max_restarts < 0 or not self.window_seconds > 0:
            raise ValueError("max_restarts must be at least 0 and window_seconds above 0")

    def recent(self, restarts: tuple[float, ...], now: float) -> tuple[float, ...]:
        """Return the restart times, in seconds, within the window before ``now``."""
        return tuple(time for time in restarts if now - time < self.window_seconds)

    def allows(self, restarts: tuple[float, ...], now: float) -> bool:
        """Return whether the policy allows one more restart at ``now``."""
        return len(self.recent(restarts, now)) < self.max_restarts
