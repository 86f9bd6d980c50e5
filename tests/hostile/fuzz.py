"""Coverage-guided fuzzing of requests: `make fuzz`.

        python tests/hostile/fuzz.py parsing 100000   decode a request, validate, build its error
        python tests/hostile/fuzz.py wire 100000      the same through gRPC to a server in process
        python tests/hostile/fuzz.py wire FILE        replay a recorded finding

The first byte of an input chooses the rpc, the others are the request. libFuzzer mutates one
input in four byte by byte; the others get fields from `hostile_requests` appended, which
protobuf reads as setting them.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import atheris
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, seed, settings

# Atheris prints every instrumented module on stderr.
with redirect_stderr(StringIO()), atheris.instrument_imports(include=["runner_server"]):
    from hostile.fuzz_targets import Parsing, Target, Wire

from support.hostile_requests import METHODS, Call, calls

_SEEDS = 1500
_MAX_BYTES = 20_000
_TIMEOUT_SECONDS = 20
_REPORT_EVERY = 10_000
_TARGETS: dict[str, Callable[[], Target]] = {"parsing": Parsing, "wire": Wire}
_BYTE_BY_BYTE = 0.25
_CLASSES = [GetMessageClass(method.input_type) for method in METHODS]


def _pool() -> list[bytes]:
    """Return initial inputs, the same in each run."""
    names = [method.name for method in METHODS]
    found: list[bytes] = []

    @seed(0)
    @settings(max_examples=_SEEDS, database=None, deadline=None)
    @given(calls(lambda _name: True))
    def collect(call: Call) -> None:
        name, data = call
        if len(data) < _MAX_BYTES:
            found.append(bytes([names.index(name)]) + data)

    collect()
    return found


def _mutator(pool: list[bytes]) -> Callable[[bytes, int, int], bytes]:
    by_rpc: dict[int, list[bytes]] = {}
    for found in filter(_is_message, pool):
        by_rpc.setdefault(found[0], []).append(found[1:])

    def mutate(data: bytes, max_size: int, number: int) -> bytes:
        draw = random.Random(number)  # noqa: S311 - chooses what to try
        if draw.random() < _BYTE_BY_BYTE:
            return bytes(atheris.Mutate(data, max_size))
        if not _is_message(data):
            data = draw.choice(pool)
        return (data + draw.choice(by_rpc[data[0]]))[:max_size]

    return mutate


def _is_message(data: bytes) -> bool:
    try:
        return data[0] < len(METHODS) and bool(_CLASSES[data[0]].FromString(data[1:]))
    except (DecodeError, IndexError):
        return False


class _Counter:
    """Run a target a fixed number of times, count the outcomes, and end the process."""

    def __init__(self, target: Target, runs: int, folder: Path) -> None:
        self._target = target
        self._folder = folder
        self._runs = runs
        self._count = 0
        self._endings: Counter[str] = Counter()
        self._began = time.monotonic()

    def __call__(self, data: bytes) -> None:
        name = METHODS[data[0] % len(METHODS)].name if data else METHODS[0].name
        self._endings[f"{name}: {self._target.send((name, data[1:]))}"] += 1
        self._count += 1
        if self._count % _REPORT_EVERY == 0:
            sys.stdout.write(f"{self._count} requests\n")
            sys.stdout.flush()
        if self._count == self._runs:
            self._finish()

    def _finish(self) -> None:
        notes = self._target.close()
        seconds = time.monotonic() - self._began
        sys.stdout.write(f"{self._count} requests in {seconds:.0f} s; {notes}\n")
        for ending, count in sorted(self._endings.items()):
            sys.stdout.write(f"{count:>9}  {ending}\n")
        sys.stdout.flush()
        shutil.rmtree(self._folder)
        # libFuzzer would go on, and the interpreter's exit would wait for the server's threads.
        os._exit(0)


def main() -> None:
    """Fuzz until the given number of requests is made or a failure is found."""
    kind, what = sys.argv[1:]
    target = _TARGETS[kind]()
    pool = _pool()
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{kind}-"))
    options = [f"-timeout={_TIMEOUT_SECONDS}", f"-max_len={_MAX_BYTES}", "-rss_limit_mb=4096"]
    if what.isdecimal():
        corpus = folder / "corpus"
        corpus.mkdir()
        for number, data in enumerate(pool):
            (corpus / str(number)).write_bytes(data)
        options += ["-verbosity=0", f"-artifact_prefix={folder}/", str(corpus)]
    else:
        options.append(what)
    run = _Counter(target, int(what) if what.isdecimal() else 0, folder)
    atheris.Setup([sys.argv[0], *options], run, custom_mutator=_mutator(pool))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
