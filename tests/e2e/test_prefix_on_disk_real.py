"""Prefixes on disk survive an unload, a kill and a restart, with real processes."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runner_client import Completion, Options, RunnerProcess
from support.fake_child import wait_until

pytestmark = pytest.mark.mlx

DEMO = Path(__file__).parents[2] / "runner_server/demo/model"
BLOCK = 128
LENGTH = 700
WHOLE = LENGTH // BLOCK * BLOCK
GREEDY = Options(num_predict=12, temperature=0)
SEEDED = Options(num_predict=12, temperature=1, seed=3)


@contextmanager
def _runner(directory: Path | None) -> Iterator[RunnerProcess]:
    """Run the demo model, whose trained weights have no near-ties."""
    env = {"MLX_RUNNER_PREFIX_CACHE_DIR": str(directory)} if directory else {}
    # Two sequences, because the blocks in transit take a part of the memory.
    with RunnerProcess(str(DEMO), prefix_cache_bytes=32 << 20, env=env) as runner:
        yield runner


def _complete(runner: RunnerProcess, seed: int, options: Options = GREEDY) -> Completion:
    prompt = random.Random(seed).choices(range(5, 2000), k=LENGTH)  # noqa: S311 - test data
    return runner.complete(prompt, options=options)


def _count(directory: Path) -> int:
    return len([*directory.glob("*.kv")])


def test_prefixes_survive_unload_kill_and_restart(tmp_path: Path) -> None:
    directory = tmp_path / "prefixes"
    blocks = WHOLE // BLOCK
    with _runner(None) as runner:
        texts = [_complete(runner, 1).content, _complete(runner, 2, SEEDED).content]
    with _runner(directory) as first:
        written = [_complete(first, 1), _complete(first, 2, SEEDED)]
        first.client.unload()
        # The unload has written the rest.
        assert _count(directory) == 2 * blocks
        first.client.load(str(DEMO), prefix_cache_bytes=32 << 20)
        loaded = _complete(first, 1)
        _complete(first, 3)
        wait_until(lambda: _count(directory) == 3 * blocks)
        # The directory is shared by a runner that lives and one that is killed.
        with _runner(directory) as second:
            shared = _complete(second, 3)
            assert first.pid
            os.kill(first.pid, signal.SIGKILL)
            restarted = [_complete(second, 1), _complete(second, 2, SEEDED)]
    assert [each.content for each in written] == texts
    assert [each.content for each in restarted] == texts
    assert loaded.content == texts[0]
    assert [each.prompt_cached_count for each in written] == [0, 0]
    assert [each.prompt_cached_count for each in (loaded, shared, *restarted)] == [WHOLE] * 4
