"""mlx_lm's BatchGenerator called in process, without a server."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.contenders._environment import environment
from bench.contenders.base import PARALLEL, Contender
from bench.load import TAIL_SECONDS
from bench.records import TEMPERATURE, TOP_K, TOP_P, ContenderError, Record, Request

_CHILD = Path(__file__).with_name("_direct_child.py")


class Direct(Contender):
    """A process that runs only mlx_lm, driven by one JSON line per run in each direction."""

    name = "direct"

    async def start(self) -> None:
        """Start the process and wait until the model is loaded."""
        # -P: modules next to the script must not shadow others.
        command = [sys.executable, "-P", str(_CHILD), str(self.setup.model), str(PARALLEL)]
        await self._spawn(command, environment(self.setup.blas), pipes=True)
        await self._line()

    async def run(self, requests: Sequence[Request]) -> list[Record]:
        """Run the requests inside the process; see ``Contender.run``."""
        process = self._alive()
        if process.stdin is None:
            raise ContenderError("stdin is not a pipe")
        order = {
            "tail_seconds": TAIL_SECONDS,
            "sampling": {"temp": TEMPERATURE, "top_p": TOP_P, "top_k": TOP_K},
            "requests": [asdict(request) for request in requests],
        }
        process.stdin.write(json.dumps(order).encode() + b"\n")
        answer = json.loads(await self._line())
        records = [_record(fields) for fields in answer["records"]]
        for request, record in zip(requests, records, strict=True):
            if not request.background:
                record.check(request)
        return records


def _record(fields: dict[str, Any]) -> Record:
    return Record(
        sent=fields["sent"],
        chunks=[(time, 1) for time in fields["times"]],
        prompt_tokens=fields["prompt_tokens"],
        completion_tokens=len(fields["token_ids"]),
        token_ids=fields["token_ids"],
    )
