"""The ranks of a distributed model in the client's status."""

from __future__ import annotations

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import MemoryUsage, Rank
from runner_client.rpc.messages.responses import status


def test_a_status_names_the_ranks() -> None:
    usage = pb.MemoryUsage(active_bytes=1, cache_bytes=2, peak_bytes=3, process_bytes=4)
    message = pb.StatusResponse(
        ranks=[
            pb.Rank(host="one", pid=10, device="gpu: M3"),
            pb.Rank(rank=1, host="two", pid=11, memory_usage=usage),
        ]
    )
    assert status(message).ranks == (
        Rank(0, "one", 10, "gpu: M3", MemoryUsage(0, 0, 0, 0, 0)),
        Rank(1, "two", 11, "", MemoryUsage(1, 2, 3, 4, 0)),
    )


def test_a_single_process_has_no_ranks() -> None:
    assert status(pb.StatusResponse()).ranks == ()
