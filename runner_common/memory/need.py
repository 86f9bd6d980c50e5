"""Memory need of a runner, part by part."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Most memory a runner's process takes with one model, in bytes.

    Attributes:
        weight_bytes: The weights in memory.
        kv_bytes: KV caches and recurrent states of all sequences at full length.
        prefix_cache_bytes: Largest size of the prefix cache.
        working_bytes: Arrays of a prefill chunk or a decode step, the copy of a layer's
            cache while it grows, and the buffers that MLX keeps for reuse.
        process_bytes: Interpreter, libraries, tokenizer and heap, and the process that renders chat
            templates.
        load_transient_bytes: Memory for reading the files, beyond all of the above.
        has_default_prefix_cache: Whether the prefix cache has its default size, which is
            reduced if memory is short.
    """

    weight_bytes: int
    kv_bytes: int
    prefix_cache_bytes: int
    working_bytes: int
    process_bytes: int
    load_transient_bytes: int
    has_default_prefix_cache: bool = False

    @property
    def parts(self) -> dict[str, int]:
        """The parts by name; ``total_bytes`` is the sum."""
        return {
            "weights": self.weight_bytes,
            "KV cache": self.kv_bytes,
            "prefix cache": self.prefix_cache_bytes,
            "working memory": self.working_bytes,
            "process": self.process_bytes,
            "load transient": self.load_transient_bytes,
        }

    @property
    def total_bytes(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())

    @property
    def required_bytes(self) -> int:
        """The total, without the prefix cache if that has its default size."""
        return self.total_bytes - self.has_default_prefix_cache * self.prefix_cache_bytes

    @property
    def mlx_bytes(self) -> int:
        """MLX's memory limit: the most that it holds while completions run."""
        return self.weight_bytes + self.kv_bytes + self.prefix_cache_bytes + self.working_bytes

    def with_draft(self, draft: MemoryNeed) -> MemoryNeed:
        """Return the need of the model with a draft model in the same process."""
        return replace(
            self,
            weight_bytes=self.weight_bytes + draft.weight_bytes,
            kv_bytes=self.kv_bytes + draft.kv_bytes,
            # The two models are read and run one after the other.
            working_bytes=max(self.working_bytes, draft.working_bytes),
            load_transient_bytes=max(self.load_transient_bytes, draft.load_transient_bytes),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)
