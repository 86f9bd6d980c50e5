"""The fake runner for users' own tests."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from runner_client import Options, RunnerClient, State, errors
from runner_client.testing import Failure, fake_runner


def test_the_example_of_the_docstring_works() -> None:
    with fake_runner(pieces=("Hello", " world")) as runner:
        with RunnerClient(runner.address) as client:
            assert client.complete("Hi").content == "Hello world"
        assert isinstance(runner.requests[0], pb.CompletionRequest)
        assert runner.requests[0].prompt == "Hi"


def test_a_full_queue_reports_its_retry_delay() -> None:
    failure = Failure("QUEUE_FULL", retry_delay_seconds=2)
    with fake_runner(failure=failure) as runner, RunnerClient(runner.address) as client:
        with pytest.raises(errors.QueueFullError) as caught:
            client.complete("Hi")
        assert caught.value.retry_delay_seconds == 2
        runner.failure = None
        assert client.complete("Hi").content == "Hello world"


def test_a_fake_may_start_without_a_model() -> None:
    with fake_runner() as runner, RunnerClient(runner.address) as client:
        runner.model = None
        assert client.status().state is State.IDLE
        with pytest.raises(errors.ModelNotLoadedError):
            client.tokenize("x")
        assert client.load("org/name").model == client.status().model


def test_a_model_that_does_not_fit_is_refused_unless_overridden() -> None:
    with fake_runner() as runner, RunnerClient(runner.address) as client:
        runner.model, runner.available_bytes = None, runner.model_bytes - 1
        assert not client.estimate("org/name").fits
        with pytest.raises(errors.InsufficientMemoryError) as caught:
            client.load("org/name")
        assert caught.value.required_bytes == runner.model_bytes
        assert caught.value.available_bytes == runner.available_bytes
        assert client.status().model is None
        assert not client.load("org/name", memory_override=True).model.dtype_fallback
        assert client.load("org/name", dtype="bfloat16")


def test_a_model_that_fits_only_as_stored_falls_back() -> None:
    with fake_runner() as runner, RunnerClient(runner.address) as client:
        runner.available_bytes = runner.model_bytes - 1
        estimate = client.estimate("org/name", dtype="auto_or_stored")
        assert (estimate.fits, estimate.dtype) == (True, "as_stored")
        assert estimate.notes
        loaded = client.load("org/name", dtype="auto_or_stored").model
        assert loaded.dtype_fallback
        assert client.status().model == loaded
        runner.available_bytes = runner.model_bytes
        assert not client.load("org/name", dtype="auto_or_stored").model.dtype_fallback


def test_a_trim_during_a_load_is_refused() -> None:
    with fake_runner() as runner, RunnerClient(runner.address) as client:
        runner.load_seconds = 30.0
        load = threading.Thread(target=_load_until_closed, args=(client,))
        load.start()
        while client.status().state is not State.LOADING:
            pass
        with pytest.raises(errors.BusyError):
            client.trim()
        client.close()
        load.join(10)


def _load_until_closed(client: RunnerClient) -> None:
    with pytest.raises(errors.RunnerUnavailableError):
        client.load("org/name")


def test_several_fakes_run_side_by_side() -> None:
    with fake_runner(pieces="ab") as one, fake_runner(pieces="cd", listen="unix") as two:
        assert one.address != two.address
        with RunnerClient(one.address) as first, RunnerClient(two.address) as second:
            assert first.complete("").content + second.complete("").content == "abcd"


def test_a_finished_completion_is_not_cancelled() -> None:
    with fake_runner() as runner, RunnerClient(runner.address) as client:
        for _ in range(50):
            client.complete("Hi")
        assert not runner.cancelled.is_set()


def test_leaving_the_block_ends_calls_threads_and_socket() -> None:
    before = threading.active_count()
    with fake_runner(listen="unix") as runner:
        runner.stall_after = 1
        folder = Path(runner.address.removeprefix("unix:")).parent
        client = RunnerClient(runner.address)
        stream = client.completion("Hi")
        next(stream)
    assert not folder.exists()
    with pytest.raises(errors.RunnerUnavailableError) as caught:
        next(stream)
    assert caught.value.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    client.close()
    # The watchdog of the client's streams lingers for some seconds.
    assert threading.active_count() <= before + 1


def test_log_probabilities_are_returned_on_request() -> None:
    with fake_runner(pieces=("é", "!")) as runner, RunnerClient(runner.address) as client:
        entries = client.complete("Hi", logprobs=3).logprobs
        assert [(entry.token_id, entry.text) for entry in entries] == [(0, "é"), (1, "!")]
        assert b"".join(entry.bytes for entry in entries) == "é!".encode()
        assert not client.complete("Hi").logprobs


def test_headers_come_before_the_first_chunk() -> None:
    with fake_runner() as runner, grpc.insecure_channel(runner.address) as channel:
        runner.stall_after = 0
        call = runner_pb2_grpc.RunnerServiceStub(channel).Completion(pb.CompletionRequest())
        call.initial_metadata()
        call.cancel()


def test_a_stop_token_ends_the_text() -> None:
    options = Options(stop_token_ids=(1,))
    with fake_runner(pieces=("a", "b", "c")) as runner, RunnerClient(runner.address) as client:
        done = client.complete("Hi", options=options)
    assert (done.content, done.token_ids, done.eval_count) == ("a", (0, 1), 2)


def test_a_request_that_bypasses_the_prefix_cache_takes_nothing_from_it() -> None:
    with fake_runner() as runner, RunnerClient(runner.address) as client:
        runner.prompt_cached_count = 3
        assert client.complete("Hi").prompt_cached_count == 3
        assert client.complete("Hi", bypass_prefix_cache=True).prompt_cached_count == 0


def test_requested_tokens_have_a_log_probability() -> None:
    with fake_runner(pieces=("a", "b")) as runner, RunnerClient(runner.address) as client:
        entries = client.complete("Hi", logprob_token_ids=[1, 5]).logprobs
    assert [[each.logprob for each in entry.candidates] for entry in entries] == [
        [-math.inf, -math.inf],
        [0, -math.inf],
    ]


@pytest.mark.parametrize("prompt", ["añb", [97, 241, 98]])
def test_the_tokens_of_a_prompt_have_log_probabilities(prompt: str | list[int]) -> None:
    with fake_runner() as runner, RunnerClient(runner.address) as client:
        assert client.complete(prompt).prompt_logprobs == ()
        entries = client.complete(prompt, prompt_logprobs=1).prompt_logprobs
    assert [(entry.token_id, entry.text, entry.logprob) for entry in entries] == [
        (241, "ñ", 0),
        (98, "b", 0),
    ]
