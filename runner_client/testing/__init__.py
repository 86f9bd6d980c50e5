"""Fake runner for the tests of programs using this library.

The fake is a real gRPC server in this process, but without a model. It does not need MLX,
starts in milliseconds, and gives the answers configured by the test::

    with fake_runner(pieces=("Hello", " world")) as runner:
        with RunnerClient(runner.address) as client:
            assert client.complete("Hi").content == "Hello world"
        assert runner.requests[0].prompt == "Hi"

    with fake_runner(failure=Failure("QUEUE_FULL", retry_delay_seconds=2)) as runner:
        ...
"""

from runner_client.testing.failure import Failure
from runner_client.testing.fake import FakeRunner, fake_runner

__all__ = ["Failure", "FakeRunner", "fake_runner"]
