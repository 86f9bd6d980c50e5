"""Rates of the machine itself: copies of memory and products of matrices."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.contenders._environment import environment
from bench.contenders.base import Program
from bench.records import ContenderError

_CHILD = Path(__file__).with_name("_machine_child.py")


@dataclass(frozen=True)
class MachineRates:
    """Rates of the machine at the shapes of a model.

    Attributes:
        copy_rate: Bytes read and written per second by copies of the size of the weights.
        kv_bytes: Bytes of the KV cache of one stream.
        product_seconds: Time of each requested group of matrix products.
    """

    copy_rate: float
    kv_bytes: int
    product_seconds: tuple[float, ...]


class Machine(Program):
    """A process measuring the machine with the matrices of a model."""

    name = "machine"
    weight_bytes = 0

    async def start(self) -> None:
        """Start the process and wait for the model."""
        # -P: modules next to the script must not shadow others.
        command = [sys.executable, "-P", str(_CHILD), str(self.setup.model)]
        await self._spawn(command, environment(self.setup.blas), pipes=True)
        self.weight_bytes = int(json.loads(await self._line())["weight_bytes"])

    async def measure(self, kv_tokens: int, products: Sequence[tuple[int, int]]) -> MachineRates:
        """Measure the machine; each figure is the best of three.

        Args:
            kv_tokens: Tokens in the KV cache of one stream.
            products: Rows multiplied by the matrices of all layers, and by the output layer.
        """
        process = self._alive()
        if process.stdin is None:
            raise ContenderError("stdin is not a pipe")
        order = {"kv_tokens": kv_tokens, "products": products}
        process.stdin.write(json.dumps(order).encode() + b"\n")
        answer = json.loads(await self._line())
        return MachineRates(
            answer["copy_rate"], answer["kv_bytes"], tuple(answer["product_seconds"])
        )
