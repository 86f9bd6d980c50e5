"""A request to embed texts: status, vectors, counts and times."""

from __future__ import annotations

import time
from array import array

from runner_server.engine.embedding.types import Embedded, EmbedSpec, Vectors
from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.output.result import ResultChannel
from runner_server.engine.request import EngineRequest
from runner_server.engine.types import GenerationStats, Prefill


class EmbeddingRequest(EngineRequest[ResultChannel[Vectors]]):
    """Collects the vectors of the texts, in any order.

    At any time at most one of its texts has a KV cache that outlives a work item. Any thread may
    call :meth:`stats`.

    Args:
        spec: The validated request.

    Attributes:
        spec: The validated request.
    """

    def __init__(self, spec: EmbedSpec) -> None:
        longest = max(map(len, spec.texts))
        super().__init__(spec.request_id, spec.priority, longest, ResultChannel())
        self.spec = spec
        self._vectors: dict[int, array[float]] = {}
        self._held_count = 0

    @property
    def kv_token_count(self) -> int:
        """Number of tokens in the caches of a text. Thread-safe."""
        return self._held_count

    def on_prefill(self, event: Prefill) -> None:
        """Record the evaluation of a part of a text."""
        self._held_count = event.prefilled

    def on_vector(self, event: Embedded) -> bool:
        """Add a vector; the last one finishes the request.

        Returns:
            True if this was the last vector.
        """
        self._held_count = 0
        self._vectors[event.text] = event.vector
        if len(self._vectors) < len(self.spec.texts):
            return False
        self._finish()
        stats = self.stats()
        vectors = tuple(self._vectors[text] for text in range(len(self.spec.texts)))
        self.stream.put(Vectors(vectors, stats.queue_seconds, stats.prompt_seconds or 0.0))
        return True

    def stats(self) -> GenerationStats:
        """Return the usage and timing so far, without generated tokens. Thread-safe."""
        now = self._finished_at or time.monotonic()
        admitted = self._admitted_at
        return GenerationStats(
            prompt_count=sum(map(len, self.spec.texts)),
            cached_count=0,
            eval_count=0,
            queue_seconds=(admitted or now) - self.submitted_at,
            prompt_seconds=None if admitted is None else now - admitted,
            eval_seconds=None,
            reason=None,
        )

    def _finish(self) -> None:
        super()._finish()
        self._held_count = 0


AnyRequest = GenerationRequest | EmbeddingRequest
"""A request of either kind."""
