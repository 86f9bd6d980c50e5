"""A stand-in for the process that computes the needs of models, and its answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from runner_common.host_memory.free import FreeMemory
from runner_common.memory.need import MemoryNeed
from runner_common.memory.need_query import NeedAnswer, NeedRequest
from support.fakes import Gate

GIB = 2**30
NEED = MemoryNeed(8 * GIB, 4 * GIB, 2 * GIB, GIB, GIB // 2, GIB // 4, has_default_prefix_cache=True)
STORED = replace(NEED, weight_bytes=GIB)


def free(available_bytes: int) -> FreeMemory:
    """Return a measurement of a machine without a GPU."""
    return FreeMemory(available_bytes, "system", available_bytes, None, None, "Some CPU", "cpu")


@dataclass
class FakeNeedProcess:
    """Stand-in for the process computing the needs of a model.

    Attributes:
        requests: The questions received, in order.
        errors: Errors raised instead of an answer, by format.
        gate: Passed by every question.
    """

    requests: list[NeedRequest] = field(default_factory=list)
    errors: dict[str, Exception] = field(default_factory=dict)
    gate: Gate = field(default_factory=Gate)

    def ask(self, request: NeedRequest, environ: Mapping[str, str]) -> NeedAnswer:
        """See ``runner_common.memory.need_query.ask_need``."""
        assert environ
        self.requests.append(request)
        self.gate.pass_through()
        if error := self.errors.get(request.dtype):
            raise error
        dtype = {"auto": "float32"}.get(request.dtype, request.dtype)
        need = STORED if dtype == "as_stored" else NEED
        context = request.context_length or 4096
        return NeedAnswer(need, dtype, context, 32768, request.parallel)
