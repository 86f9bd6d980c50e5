"""Child process of the contender ``direct``: BatchGenerator driven by JSON lines.

Started as ``_direct_child.py MODEL PARALLEL``. The process prints one line once the model is
loaded, then answers each line of stdin, which describes a run, with one line on stdout. Nothing
from this project is imported.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler


class Run:
    """A run: sends requests at their scheduled times until the foreground ones are done."""

    def __init__(self, generator: BatchGenerator, order: dict[str, Any]) -> None:
        self._generator = generator
        self._requests = order["requests"]
        self._sampling = order["sampling"]
        self._tail_seconds = order["tail_seconds"]
        self._records: list[dict[str, Any]] = [
            {"sent": 0.0, "times": [], "token_ids": [], "prompt_tokens": 0} for _ in self._requests
        ]
        self._waiting = sorted(
            range(len(self._requests)), key=lambda i: self._requests[i]["delay_seconds"]
        )
        self._running: dict[int, int] = {}

    def __call__(self) -> list[dict[str, Any]]:
        """Step until every foreground request is done."""
        begin = time.monotonic()
        while not self._is_done():
            self._admit(begin)
            self._step()
        if self._running:
            self._finish_background(time.monotonic() + self._tail_seconds)
        return self._records

    def _is_done(self) -> bool:
        left = [*self._waiting, *self._running.values()]
        return all(self._requests[i]["background"] for i in left)

    def _admit(self, begin: float) -> None:
        while self._waiting:
            index = self._waiting[0]
            now = time.monotonic()
            if now - begin < self._requests[index]["delay_seconds"]:
                return
            self._waiting.pop(0)
            self._records[index]["sent"] = now
            self._insert(index)

    def _insert(self, index: int) -> None:
        request = self._requests[index]
        prompt = request["prompt"]["token_ids"]
        sampler = make_sampler(**self._sampling) if request["sampled"] else None
        samplers = [sampler] if sampler else None
        (uid,) = self._generator.insert([prompt], [request["max_tokens"]], samplers=samplers)
        self._records[index]["prompt_tokens"] = len(prompt)
        self._running[uid] = index

    def _step(self) -> None:
        _, generated = self._generator.next()
        now = time.monotonic()
        for answer in generated:
            record = self._records[self._running[answer.uid]]
            record["times"].append(now)
            record["token_ids"].append(answer.token)
            if answer.finish_reason:
                del self._running[answer.uid]

    def _finish_background(self, deadline: float) -> None:
        while self._running and time.monotonic() < deadline:
            self._step()
        self._generator.remove(list(self._running))


def main() -> None:
    """Load the model and execute runs until stdin is closed."""
    path, parallel = sys.argv[1], int(sys.argv[2])
    model, _ = load(path)
    mx.eval(model.parameters())
    generator = BatchGenerator(model, completion_batch_size=parallel)
    sys.stdout.write('{"ready": true}\n')
    sys.stdout.flush()
    for line in sys.stdin:
        records = Run(generator, json.loads(line))()
        sys.stdout.write(json.dumps({"records": records}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
