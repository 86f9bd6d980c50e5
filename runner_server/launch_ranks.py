"""Startup under ``mlx.launch``: rank 0 serves, and the other ranks follow."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from runner_server import __version__
from runner_server.app import EXIT_CANNOT_START, EXIT_ENGINE_DEAD, serve
from runner_server.config import ServerConfig
from runner_server.distributed.follower import Follower, FollowerPartners, LeaderChannel
from runner_server.distributed.hub import Hub
from runner_server.distributed.leader import LeaderBackend, LeaderPartners
from runner_server.distributed.link import Link
from runner_server.distributed.messages import AskStop, Hello
from runner_server.host.machine_admission import MachineAdmission
from runner_server.host.model_root import ModelRoot
from runner_server.mlx_backend import MlxBackend

if TYPE_CHECKING:
    from runner_server.mlx_backend.sharding import Group

logger = logging.getLogger(__name__)

JOIN_SECONDS = 120.0
"""Longest wait of the ranks for each other at start. Logging in to a large cluster takes time."""


def run(config: ServerConfig, admission: MachineAdmission) -> int:
    """Serve as rank 0, or follow rank 0; return the exit code.

    Args:
        config: Options of the server, the same on every rank.
        admission: Decides whether there is memory for this rank's part of a load.
    """
    if "MLX_RANK" not in os.environ:
        logger.error(
            "--distributed: MLX_RANK is not set; start all ranks with mlx.launch, for instance "
            "mlx.launch -n 2 -- mlx-runner serve --distributed --model DIR"
        )
        return EXIT_CANNOT_START
    try:
        group = _join()
        work = _lead if group.rank == 0 else _follow
        serve_or_follow = work(config, group, admission)
    except (OSError, RuntimeError, ValueError) as error:
        logger.error("cannot join the ranks: %s", error)  # noqa: TRY400 - the message suffices
        return EXIT_CANNOT_START
    return serve_or_follow()


def _join() -> Group:
    rank = os.environ["MLX_RANK"]
    logger.info("rank %s waits for the others, at most %.0f s", rank, JOIN_SECONDS)
    # MLX holds the GIL while it waits, so no Python handler would run: use the default actions.
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        from runner_server.mlx_backend.sharding import Group  # noqa: PLC0415 - imports MLX

        group = Group(JOIN_SECONDS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if str(group.rank) != rank:
        raise RuntimeError(
            f"MLX connected no other rank to this one, which should be rank {rank}; does this MLX "
            "include the backend given to mlx.launch?"
        )
    return group


def _lead(config: ServerConfig, group: Group, admission: MachineAdmission) -> Callable[[], int]:
    """Wait for the followers; return the call that serves."""
    from runner_server.mlx_backend.sharding import Shard  # noqa: PLC0415 - imports MLX

    hub = Hub(_host_of_rank_0(), group.size)
    group.share(hub.address)
    hub.gather(_traits(), JOIN_SECONDS)
    logger.info("rank 0 of %d serves; the others are %s", group.size, _names(hub))
    partners = LeaderPartners(hub)
    shard = Shard(group, partners, by_layers=config.pipeline)
    backend = LeaderBackend(MlxBackend(_root(config), shard, admission), hub, partners)
    # If stdin is mlx.launch's pipe, rank 0 exits with mlx.launch, and the others with rank 0.
    ends_with_launcher = _is_pipe(sys.stdin.fileno() if sys.stdin else 0)
    config = replace(config, exit_with_parent=config.exit_with_parent or ends_with_launcher)
    return lambda: asyncio.run(serve(config, backend, hub, admission))


def _follow(config: ServerConfig, group: Group, admission: MachineAdmission) -> Callable[[], int]:
    """Connect to rank 0; return the call that follows."""
    host, port, secret = group.share(None)
    link = Link(socket.create_connection((host, port), timeout=JOIN_SECONDS))
    _ask_rank_0_on_signals(link)
    return lambda: _on_thread(lambda: _follow_to_end(config, group, link, secret, admission))


def _on_thread(work: Callable[[], int]) -> NoReturn:
    """Run work on a thread, and end the process with its exit code."""
    codes: list[int] = []
    # MLX may block for a long time, and the main thread must stay free to handle signals.
    thread = threading.Thread(target=lambda: codes.append(work()), name="engine", daemon=True)
    thread.start()
    thread.join()
    logging.shutdown()
    # As in `serve`: Python's own exit could abort while a call hangs inside MLX.
    os._exit(*codes)


def _follow_to_end(
    config: ServerConfig, group: Group, link: Link, secret: str, admission: MachineAdmission
) -> int:
    """Follow rank 0 to the end; return the exit code."""
    from runner_server.mlx_backend.sharding import Shard  # noqa: PLC0415 - imports MLX

    channel = LeaderChannel(link, lambda: os._exit(EXIT_ENGINE_DEAD))
    shard = Shard(group, FollowerPartners(channel), by_layers=config.pipeline)
    backend = MlxBackend(_root(config), shard, admission)
    try:
        device = backend.open()
        host, pid = socket.gethostname(), os.getpid()
        link.send(Hello(secret, group.rank, host, pid, device, tuple(_traits())))
        channel.start()
        Follower(backend, channel).run()
    except Exception:
        logger.critical("rank %d cannot continue, so all ranks exit", group.rank, exc_info=True)
        return EXIT_ENGINE_DEAD
    return 0


def _ask_rank_0_on_signals(link: Link) -> None:
    """Ask rank 0 to stop on SIGINT and SIGTERM; exit at once on a second signal."""
    seen: list[int] = []

    def ask() -> None:
        # If rank 0 has died, this process is ending anyway.
        with suppress(OSError):
            link.send(AskStop())

    def on_signal(number: int, _frame: object) -> None:
        if seen:
            os._exit(128 + number)
        seen.append(number)
        # In a thread, because a signal handler must not wait for another send to end.
        threading.Thread(target=ask, daemon=True).start()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)


def _host_of_rank_0() -> str:
    """Return this machine's address that ``mlx.launch`` announced to all ranks."""
    if file := os.environ.get("MLX_HOSTFILE"):
        hosts: Any = json.loads(Path(file).read_text().strip() or "[]")
        if hosts:
            return _without_port(hosts[0][0])
    if address := os.environ.get("MLX_JACCL_COORDINATOR"):
        return _without_port(address)
    return os.environ.get("NCCL_HOST_IP", "127.0.0.1")


def _without_port(address: str) -> str:
    return str(address).rpartition(":")[0].strip("[]")


def _traits() -> list[str]:
    from runner_server.mlx_backend.sharding import traits  # noqa: PLC0415 - imports MLX

    return traits(f"runner {__version__}", f"mlx-lm {importlib.metadata.version('mlx-lm')}")


def _names(hub: Hub) -> str:
    return ", ".join(f"{rank.rank} on {rank.host} (process {rank.pid})" for rank in hub.others)


def _root(config: ServerConfig) -> ModelRoot | None:
    return ModelRoot(config.model_root) if config.model_root else None


def _is_pipe(descriptor: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    except OSError:
        return False
