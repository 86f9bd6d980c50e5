"""The protocol between rank 0 and a follower, in one process with a fake model library."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from runner_server.distributed import hub as hub_module
from runner_server.distributed.follower import Follower, FollowerPartners, LeaderChannel
from runner_server.distributed.hub import Hub
from runner_server.distributed.leader import LeaderBackend, LeaderPartners
from runner_server.distributed.link import Link
from runner_server.distributed.messages import AskStop, Hello, LoadRead, Memory, Trim, encode
from runner_server.engine.backend import BackendLost
from runner_server.engine.types import Dtype, LoadSpec, MemoryCounters, Sampling, Token
from runner_server.engine.work import WorkItem, WorkReport
from runner_server.errors import InsufficientMemory, ModelNotFound, ShuttingDown
from support.fakes import DEADLINE_SECONDS, FakeBackend, FakeExecutor, FakeModel
from tools.local_batch import LocalBatch

TRAITS = ["runner 1", "cpu"]


class SplitBackend(FakeBackend):
    """Load with partners as the MLX backend does, and record the agreed values."""

    def __init__(self, partners: Any, share: float) -> None:
        super().__init__()
        self.partners = partners
        self.share = share
        self.specs: list[LoadSpec] = []
        self.shares: list[float] = []
        self.load_count = 0
        self.warm_up_error: Exception | None = None

    def load(self, spec: LoadSpec, report: Callable[[int], None]) -> FakeModel:
        """See ``Backend.load``."""
        self.specs.append(spec)
        self.partners.begin_load(spec)
        model = super().load(spec, report)
        self.shares.append(self.partners.finish_load(report, self.share))
        self.load_count += 1
        if self.warm_up_error:
            raise self.warm_up_error
        report(100)
        return model


@dataclass
class Pair:
    """Rank 0, rank 1 and the outcome of the follower's loop."""

    hub: Hub
    leader: LeaderBackend
    first: SplitBackend
    second: SplitBackend
    link: Link
    thread: threading.Thread
    ended: queue.SimpleQueue[object]
    lost: threading.Event = field(default_factory=threading.Event)


def connected(hub: Hub, traits: list[str] = TRAITS, rank: int = 1) -> Link:
    """Connect as a follower, send the hello and return the link."""
    host, port, secret = hub.address
    link = Link(socket.create_connection((host, port), timeout=DEADLINE_SECONDS))
    link.send(Hello(secret, rank, "there", 4711, "cpu: fake", tuple(traits)))
    return link


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Rank 0 and rank 1, connected, with the follower's loop running."""
    hub = Hub("127.0.0.1", 2)
    link = connected(hub)
    hub.gather(TRAITS, DEADLINE_SECONDS)
    leader_partners = LeaderPartners(hub)
    first = SplitBackend(leader_partners, 3.0)
    ended: queue.SimpleQueue[object] = queue.SimpleQueue()
    lost = threading.Event()
    channel = LeaderChannel(link, lost.set)
    second = SplitBackend(FollowerPartners(channel), 2.5)
    follower = Follower(second, channel)

    def follow() -> None:
        try:
            follower.run()
            ended.put("closed")
        except Exception as error:  # noqa: BLE001 - the test looks at it
            ended.put(error)

    thread = threading.Thread(target=follow, daemon=True)
    channel.start()
    thread.start()
    leader = LeaderBackend(first, hub, leader_partners)
    yield Pair(hub, leader, first, second, link, thread, ended, lost)
    second.open_gates()
    hub.close()
    link.close()


def ignore(_progress: int) -> None:
    """Ignore the progress of a load."""


def test_a_follower_repeats_the_calls_of_rank_0(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    items: dict[FakeExecutor, list[WorkItem]] = {}
    run = FakeExecutor.run

    def noting(executor: FakeExecutor, item: WorkItem) -> WorkReport:
        items.setdefault(executor, []).append(item)
        return run(executor, item)

    monkeypatch.setattr(FakeExecutor, "run", noting)
    spec = LoadSpec("m", context_length=64, dtype=Dtype.FLOAT32, prefix_cache_bytes=9)
    batch = LocalBatch.of(pair.leader.load(spec, ignore))
    sampling = Sampling(seed=2**64 - 1, logit_bias=((5, -1.5),), logprobs=2)
    batch.add(7, (1, 2, 3), sampling)
    batch.add(8, [4], Sampling())
    drawn = [event for _ in range(3) for event in batch.step() if isinstance(event, Token)]
    assert drawn
    batch.preempt(7)
    batch.step()
    batch.resume(7)
    batch.remove([8])
    pair.hub.close()
    assert pair.ended.get(timeout=DEADLINE_SECONDS) == "closed"
    assert pair.second.specs == [spec]
    assert pair.second.preemptions == 1
    (theirs,), (ours,) = pair.second.executors, pair.first.executors
    assert items[theirs] == items[ours]
    assert pair.second.steps == pair.first.steps == len(items[ours])
    assert theirs.rows.keys() == ours.rows.keys() == {7}
    assert [next(theirs.rows[7].tokens) for _ in range(9)] == [
        next(ours.rows[7].tokens) for _ in range(9)
    ]
    assert pair.first.shares == [2.5]


def test_a_followers_load_error_is_raised_with_its_name(pair: Pair) -> None:
    pair.second.load_error = InsufficientMemory("too little", requiredBytes=5, availableBytes=4)
    with pytest.raises(InsufficientMemory, match="rank 1 on there: too little") as raised:
        pair.leader.load(LoadSpec("m"), ignore)
    assert raised.value.metadata == {"requiredBytes": "5", "availableBytes": "4"}
    assert pair.leader.load(LoadSpec("m"), ignore)


def test_a_load_error_of_rank_0_makes_followers_drop_the_load(pair: Pair) -> None:
    pair.first.load_error = ModelNotFound("gone")
    with pytest.raises(ModelNotFound, match="gone"):
        pair.leader.load(LoadSpec("m"), ignore)
    assert pair.leader.load(LoadSpec("m"), ignore)


def test_a_load_can_be_cancelled_while_waiting_for_followers(pair: Pair) -> None:
    pair.second.load_gate.shut()

    def cancelled(progress: int) -> None:
        if progress == 95:
            pair.second.load_gate.open()
            raise ShuttingDown("the load was cancelled")

    with pytest.raises(ShuttingDown):
        pair.leader.load(LoadSpec("m"), cancelled)
    assert pair.leader.load(LoadSpec("m"), ignore)
    assert pair.first.shares == [2.5]


def test_a_load_can_be_cancelled_at_its_end(pair: Pair) -> None:
    def cancelled(progress: int) -> None:
        if progress == 100 and pair.first.load_count:
            raise ShuttingDown("the load was cancelled")

    with pytest.raises(ShuttingDown):
        pair.leader.load(LoadSpec("m"), cancelled)
    pair.leader.release()
    pair.first.load_count = 0
    assert pair.leader.load(LoadSpec("m"), ignore)
    assert not pair.lost.is_set()


def test_a_failed_warm_up_on_rank_0_ends_all_ranks(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "_LOST_SECONDS", 0.05)
    pair.first.warm_up_error = RuntimeError("no g++")
    with pytest.raises(BackendLost, match=r"rank 0 failed .RuntimeError: no g..."):
        pair.leader.load(LoadSpec("m"), ignore)
    assert pair.lost.wait(DEADLINE_SECONDS)


def test_a_failed_warm_up_on_a_follower_ends_its_loop(pair: Pair) -> None:
    pair.second.warm_up_error = RuntimeError("no g++")
    pair.leader.load(LoadSpec("m"), ignore)
    error = pair.ended.get(timeout=DEADLINE_SECONDS)
    assert isinstance(error, RuntimeError)


def test_a_failed_step_ends_all_ranks(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "_LOST_SECONDS", 0.05)
    batch = LocalBatch.of(pair.leader.load(LoadSpec("m"), ignore))
    batch.add(1, [1], Sampling())
    pair.first.failures.append(ValueError("broken"))
    with pytest.raises(BackendLost, match="ValueError: broken"):
        batch.step()
    assert pair.lost.wait(DEADLINE_SECONDS)


def test_rank_0_reports_a_lost_follower(pair: Pair) -> None:
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()
    pair.hub.watch(lost.put, lambda: None)
    pair.link.close()
    text = lost.get(timeout=DEADLINE_SECONDS)
    assert "rank 1 (process 4711 on there) is lost" in text
    with pytest.raises(BackendLost, match="rank 1"):
        pair.hub.broadcast(Trim())
    again: list[str] = []
    pair.hub.watch(again.append, lambda: None)
    assert again == [text]


def test_a_silent_follower_counts_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "SILENCE_SECONDS", 0.2)
    hub = Hub("127.0.0.1", 2)
    link = connected(hub)
    hub.gather(TRAITS, DEADLINE_SECONDS)
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()
    hub.watch(lost.put, lambda: None)
    assert "timed out" in lost.get(timeout=DEADLINE_SECONDS)
    link.close()


def test_a_follower_can_request_a_stop(pair: Pair) -> None:
    asked = threading.Event()
    pair.hub.watch(lambda _why: None, asked.set)
    pair.link.send(AskStop())
    assert asked.wait(DEADLINE_SECONDS)


def test_rank_0_knows_each_follower(pair: Pair) -> None:
    pair.leader.load(LoadSpec("m"), ignore)
    pair.link.send(Memory(MemoryCounters(5, prefix_cache_bytes=2), 77, 99))
    pair.link.send(LoadRead(1.5))
    assert pair.hub.answer(0, DEADLINE_SECONDS) == LoadRead(1.5)
    (other,) = pair.hub.others
    assert (other.rank, other.host, other.pid, other.device) == (1, "there", 4711, "cpu: fake")


def test_a_connection_without_the_secret_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "_HELLO_SECONDS", 0.2)
    hub = Hub("127.0.0.1", 2)
    host, port, _ = hub.address
    with socket.create_connection((host, port)) as stranger, socket.create_connection((host, port)):
        stranger.sendall(encode(Hello("guess", 1, "there", 1, "cpu", ())))
        link = connected(hub)
        hub.gather(TRAITS, DEADLINE_SECONDS)
        assert [rank.rank for rank in hub.others] == [1]
        assert not stranger.recv(1)
    hub.close()
    link.close()


def test_a_rank_with_other_versions_is_refused() -> None:
    hub = Hub("127.0.0.1", 2)
    link = connected(hub, ["runner 2", "cpu"])
    with pytest.raises(ValueError, match=r"rank 1 on there has \['runner 2'.*rank 0 has"):
        hub.gather(TRAITS, DEADLINE_SECONDS)
    link.close()


def test_waiting_for_a_missing_rank_times_out() -> None:
    with pytest.raises(TimeoutError, match="1 of 2 ranks did not connect"):
        Hub("127.0.0.1", 2).gather(TRAITS, 0.05)
