"""Options and metrics of the prefix cache on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner_server.config import parse_args
from runner_server.engine.prefix_disk import DiskCounters, PrefixDiskSettings
from runner_server.engine.types import MemoryCounters
from runner_server.telemetry.metrics import Metrics
from support.fakes import FakeBackend
from support.harness import StartServer

DIR, DISK = "MLX_RUNNER_PREFIX_CACHE_DIR", "MLX_RUNNER_PREFIX_CACHE_DISK"


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        ([], {}, None),
        ([], {DIR: ""}, None),
        ([], {DISK: "1GiB"}, None),
        (["--prefix-cache-dir", "/a"], {}, PrefixDiskSettings(Path("/a"), 8 << 30)),
        (
            ["--prefix-cache-dir", "/a", "--prefix-cache-disk", "2GiB"],
            {},
            PrefixDiskSettings(Path("/a"), 2 << 30),
        ),
        ([], {DIR: "/b", DISK: "3GiB"}, PrefixDiskSettings(Path("/b"), 3 << 30)),
        (
            ["--prefix-cache-dir", "/a", "--prefix-cache-disk-bytes", "2000"],
            {DIR: "/b", DISK: "3GiB"},
            PrefixDiskSettings(Path("/a"), 2000),
        ),
    ],
)
def test_options_come_before_the_environment(
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    variables: dict[str, str],
    expected: PrefixDiskSettings | None,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert parse_args(arguments).prefix_disk == expected


@pytest.mark.parametrize(
    ("arguments", "variables", "text"),
    [
        (["--prefix-cache-dir", ""], {}, "expected a directory, not an empty text"),
        (["--prefix-cache-disk", "1GiB"], {}, "--prefix-cache-disk needs --prefix-cache-dir"),
        (["--prefix-cache-dir", "/a", "--prefix-cache-disk", "0"], {}, "0 is not in the range"),
        ([], {DIR: "/a", DISK: "much"}, f"{DISK} is 'much'"),
        ([], {DIR: "/a", DISK: "0"}, f"{DISK} is 0; leave out --prefix-cache-dir"),
        (["--prefix-cache-dir", "/a", "--distributed"], {}, "cannot be used with --distributed"),
        (["--distributed"], {DIR: "/a"}, "cannot be used with --distributed"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    variables: dict[str, str],
    text: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        parse_args(arguments)
    assert text in capsys.readouterr().err


async def test_metrics_tell_what_the_disk_was_used_for(start_server: StartServer) -> None:
    backend = FakeBackend()
    server = await start_server(backend)
    metrics = Metrics(server.app.engine, "1")

    def value(name: str) -> float | None:
        return metrics.registry.get_sample_value(f"mlx_runner_prefix_cache_disk_{name}")

    assert value("bytes") == 0
    backend.memory = lambda: MemoryCounters(disk=DiskCounters(40, 30, 20, 1))  # type: ignore[method-assign]
    found = [value(name) for name in ("bytes", "written_bytes_total", "read_bytes_total")]
    assert found == [40, 30, 20]
    assert value("damaged_total") == 1
