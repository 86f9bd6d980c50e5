"""Sharding of a model across ranks, with mlx_lm's own methods and ``mx.distributed``.

Tensor parallelism (``Model.shard``) splits each matrix, so that a rank has some heads of every
layer. Pipeline parallelism (``model.pipeline``) splits the layers, so that a rank has some layers.
"""

from __future__ import annotations

import faulthandler
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, cast

import mlx.core as mx
from mlx.nn.layers.base import Module

from runner_server.engine.types import LoadSpec
from runner_server.errors import ModelUnsupported
from runner_server.mlx_backend.upstream.names import KVCache, make_prompt_cache

_SHARED_BYTES = 1024
"""Buffer size of :meth:`Group.share`, for an address and a secret."""

_SPLIT_COUNTS = ("num_attention_heads", "num_key_value_heads")
"""Numbers in config.json that must be multiples of the group size; mlx_lm silently rounds the
quotients down."""


class Group:
    """The ranks, connected by MLX.

    Args:
        timeout_seconds: Longest wait for the other ranks, after which the process exits.

    Raises:
        RuntimeError: MLX cannot connect the ranks with its settings in the environment.
    """

    def __init__(self, timeout_seconds: float) -> None:
        # MLX waits indefinitely and holds the GIL, so only a timer in C can end the process.
        faulthandler.dump_traceback_later(timeout_seconds, exit=True)
        try:
            self.all = mx.distributed.init()
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.rank = self.all.rank()
        self.size = self.all.size()

    def share(self, value: object) -> Any:
        """Return rank 0's value on every rank, ignoring the values of the others.

        Args:
            value: On rank 0, a value that takes at most 1,024 bytes as JSON.
        """
        data = json.dumps(value).encode() if self.rank == 0 else b""
        numbers = mx.array([*data, *[0] * (_SHARED_BYTES - len(data))], dtype=mx.int32)
        summed = mx.distributed.all_sum(numbers, group=self.all)
        return json.loads(bytes(cast("list[int]", summed.tolist())).rstrip(b"\0"))


def traits(*versions: str) -> list[str]:
    """Return versions and the kind of device, which must be the same on all ranks."""
    from importlib import metadata  # noqa: PLC0415 - slow, and most servers have one rank

    kind = "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
    return [*versions, f"mlx {metadata.version('mlx')}", kind]


class Partners(Protocol):
    """Coordinates a load with the other ranks."""

    def begin_load(self, spec: LoadSpec) -> None:
        """Start the load on the other ranks, with a ``spec`` that leaves no choice to them."""
        ...

    def finish_load(self, report: Callable[[int], None], kv_share: float) -> float:
        """Wait until every rank has read the weights.

        Args:
            report: Called with the progress while waiting; an exception from it ends the load.
            kv_share: Number of full-length sequences for which this rank has KV memory.

        Returns:
            The smallest share of any rank.
        """
        ...


class Shard:
    """One rank's part of a model.

    Args:
        group: All ranks.
        partners: Coordinates loads with the other ranks.
        by_layers: Whether to split the layers even if mlx_lm can split the matrices.
    """

    def __init__(self, group: Group, partners: Partners, *, by_layers: bool) -> None:
        self._group = group
        self._is_first = int(group.rank == 0)
        self._by_layers = by_layers
        self.partners = partners

    def split(self, model: Module, config: dict[str, Any], spec: LoadSpec) -> LoadSpec:
        """Reduce a model with lazy weights to this rank's part.

        Returns:
            The load to continue with. If the layers are split it has no prefix cache, because ranks
            with more layers would have room for fewer prompts than the others.

        Raises:
            ModelUnsupported: mlx_lm cannot shard the model, or not across this number of ranks.
        """
        has_shard = hasattr(model, "shard")
        inner = getattr(model, "model", None)
        try:
            if has_shard and not self._by_layers:
                self._check_counts(config)
                cast("Any", model).shard(self._group.all)
                return spec
            if hasattr(inner, "pipeline"):
                cast("Any", inner).pipeline(self._group.all)
                _require_plain_caches(model)
                return replace(spec, prefix_cache_bytes=0)
        except ValueError as error:
            raise self._cannot(config, str(error)) from error
        raise self._cannot(
            config,
            "mlx_lm splits the matrices of this type, not its layers: leave out --pipeline"
            if has_shard
            else "mlx_lm cannot split this type: serve it without --distributed",
        )

    def agree(self, drawn: mx.array) -> mx.array:
        """Return the tokens drawn by rank 0 on every rank, unevaluated.

        The other ranks' tokens are multiplied by 0 rather than left out, so that their last layers
        are computed, for which rank 0 waits.
        """
        return mx.distributed.all_sum(drawn * self._is_first, group=self._group.all)

    def _check_counts(self, config: dict[str, Any]) -> None:
        parts = [config, config.get("text_config")]
        for part in parts:
            for name in _SPLIT_COUNTS:
                count = part.get(name) if isinstance(part, dict) else None
                if isinstance(count, int) and count % self._group.size:
                    raise ValueError(f"its {name} is {count}")

    def _cannot(self, config: dict[str, Any], why: str) -> ModelUnsupported:
        return ModelUnsupported(
            f"a model of type {config['model_type']!r} cannot be split among {self._group.size} "
            f"ranks: {why}"
        )


def _require_plain_caches(model: Module) -> None:
    """Refuse caches other than ``KVCache``, for which ranks with different layers may disagree.

    Raises:
        ValueError: The model has such caches.
    """
    kinds = {type(cache).__name__ for cache in make_prompt_cache(model)} - {KVCache.__name__}
    if kinds:
        raise ValueError(f"its layers have caches of kind {', '.join(sorted(kinds))}")
