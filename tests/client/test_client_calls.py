"""RunnerClient against the fake runner, over TCP and a unix socket."""

from __future__ import annotations

import gc
import math
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import RunnerClient, errors
from runner_client.testing import Failure, FakeRunner, fake_runner
from runner_client.types import DoneReason, Options, State, Timeouts


def test_an_empty_address_is_refused() -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        RunnerClient("")


def test_a_completion_streams_its_chunks(client: RunnerClient) -> None:
    chunks = list(client.completion("Hi"))
    assert [chunk.content for chunk in chunks] == ["Hello", " world", ""]
    assert [chunk.done for chunk in chunks] == [False, False, True]
    assert chunks[-1].done_reason is DoneReason.STOP
    assert chunks[-1].eval_count == 2
    assert chunks[0].done_reason is None


def test_complete_joins_the_chunks(client: RunnerClient) -> None:
    completion = client.complete("Hi")
    assert completion.content == "Hello world"
    assert completion.token_ids == (0, 1)
    assert completion.done_reason is DoneReason.STOP


def test_the_request_carries_all_arguments(client: RunnerClient, runner: FakeRunner) -> None:
    options = Options(
        temperature=0,
        top_k=0,
        seed=7,
        stop=("\n",),
        logit_bias={3: -1.5},
        stop_token_ids=(5, 6),
        ignore_eos=True,
        min_predict=4,
        penalize_output_only=True,
    )
    client.complete(
        "Hi",
        options=options,
        logprobs=0,
        request_id="me",
        priority=-7,
        bypass_prefix_cache=True,
        cache_salt="mine",
        literal=True,
        logprob_token_ids=(8, 9),
        prompt_logprobs=0,
    )
    expected = pb.CompletionRequest(prompt="Hi", logprobs=0, request_id="me", priority=-7)
    expected.bypass_prefix_cache = True
    expected.cache_salt = "mine"
    expected.literal = True
    expected.logprob_token_ids.extend([8, 9])
    expected.prompt_logprobs = 0
    expected.options.temperature = 0
    expected.options.top_k = 0
    expected.options.seed = 7
    expected.options.stop.append("\n")
    expected.options.logit_bias[3] = -1.5
    expected.options.stop_token_ids.extend([5, 6])
    expected.options.ignore_eos = True
    expected.options.min_predict = 4
    expected.options.penalize_output_only = True
    assert runner.requests == [expected]


def test_omitted_options_are_unset(client: RunnerClient, runner: FakeRunner) -> None:
    client.complete([1, 2, 3])
    sent = runner.requests[0]
    assert isinstance(sent, pb.CompletionRequest)
    assert list(sent.prompt_token_ids.ids) == [1, 2, 3]
    assert sent.options == pb.CompletionOptions()
    assert not sent.HasField("logprobs")


def test_leaving_the_block_cancels_on_the_server(client: RunnerClient, runner: FakeRunner) -> None:
    runner.piece_delay_seconds = 0.01
    runner.pieces = ["x"] * 100_000
    with client.completion("Hi") as stream:
        next(stream)
    assert runner.cancelled.wait(10)


def test_dropping_the_stream_cancels_on_the_server(
    client: RunnerClient, runner: FakeRunner
) -> None:
    runner.piece_delay_seconds = 0.01
    runner.pieces = ["x"] * 100_000
    for _ in client.completion("Hi"):
        break
    gc.collect()
    assert runner.cancelled.wait(10)


def test_reading_after_a_cancel_raises_incomplete_stream(
    client: RunnerClient, runner: FakeRunner
) -> None:
    runner.stall_after = 0
    stream = client.completion("Hi")
    threading.Timer(0.05, stream.cancel).start()
    with pytest.raises(errors.IncompleteStreamError, match="cancelled by its reader"):
        next(stream)


def test_a_finished_stream_stays_finished(client: RunnerClient) -> None:
    stream = client.completion("Hi")
    list(stream)
    stream.cancel()
    assert list(stream) == []


def test_a_stream_left_open_after_its_last_message_is_cancelled(
    client: RunnerClient, runner: FakeRunner
) -> None:
    runner.ends_after_done = False
    assert client.complete("Hi").content == "Hello world"
    assert runner.cancelled.wait(10)


def test_a_stream_without_its_last_message_is_incomplete(
    client: RunnerClient, runner: FakeRunner
) -> None:
    runner.is_complete = False
    stream = client.completion("Hi")
    assert [next(stream).content, next(stream).content] == ["Hello", " world"]
    with pytest.raises(errors.IncompleteStreamError, match="without its last message"):
        next(stream)


def test_a_failure_mid_stream_is_raised_after_the_text(
    client: RunnerClient, runner: FakeRunner
) -> None:
    runner.failure, runner.fail_after = Failure("GENERATION_FAILED"), 1
    stream = client.completion("Hi")
    assert next(stream).content == "Hello"
    with pytest.raises(errors.GenerationFailedError):
        next(stream)


def test_a_missing_first_token_times_out(runner: FakeRunner) -> None:
    runner.stall_after = 0
    timeouts = Timeouts(first_token_seconds=1.0, idle_seconds=60)
    with RunnerClient(runner.address, timeouts=timeouts) as client:
        # The limit must leave time for the request to arrive; only then can it be cancelled.
        client.status()
        with pytest.raises(errors.RunnerTimeoutError, match="first_token_seconds") as caught:
            client.complete("Hi")
        assert (caught.value.phase, caught.value.timeout_seconds) == ("first_token", 1.0)
    assert runner.cancelled.wait(10)


def test_progress_messages_do_not_extend_the_first_token_limit(runner: FakeRunner) -> None:
    runner.progress_messages, runner.piece_delay_seconds = 1_000_000, 0.01
    timeouts = Timeouts(first_token_seconds=0.3, idle_seconds=60)
    with RunnerClient(runner.address, timeouts=timeouts) as client:
        with pytest.raises(errors.RunnerTimeoutError) as caught:
            client.complete("Hi")
        assert caught.value.phase == "first_token"


def test_progress_messages_keep_a_stream_from_being_idle(runner: FakeRunner) -> None:
    runner.progress_messages, runner.piece_delay_seconds = 20, 0.05
    with RunnerClient(runner.address, timeouts=Timeouts(idle_seconds=0.5)) as client:
        chunks = list(client.completion("Hi"))
    progress = chunks[3].prompt_progress
    assert progress is not None
    assert (progress.evaluated_count, progress.total_count) == (3, 20)
    assert chunks[-1].done


def test_a_silent_stream_times_out(runner: FakeRunner) -> None:
    with RunnerClient(runner.address, timeouts=Timeouts(idle_seconds=0.2)) as client:
        runner.stall_after = 1
        stream = client.completion("Hi")
        next(stream)
        with pytest.raises(errors.RunnerTimeoutError, match="idle_seconds") as caught:
            list(stream)
    assert (caught.value.phase, caught.value.timeout_seconds) == ("idle", 0.2)
    assert runner.cancelled.wait(10)


def test_a_slow_reader_is_not_idle(runner: FakeRunner) -> None:
    with RunnerClient(runner.address, timeouts=Timeouts(idle_seconds=0.1)) as client:
        stream = client.completion("Hi")
        next(stream)
        time.sleep(0.3)  # time spent in the reader does not count as idle
        assert [chunk.content for chunk in stream] == [" world", ""]


def test_an_unanswered_call_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        client = RunnerClient(address, timeouts=Timeouts(call_seconds=0.2))
        with client, pytest.raises(errors.RunnerTimeoutError) as caught:
            client.unload()
    assert (caught.value.phase, caught.value.timeout_seconds) == ("call", 0.2)


def test_a_missing_runner_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with RunnerClient(address) as client:
        for call in (client.status, client.unload, lambda: client.complete("Hi")):
            with pytest.raises(errors.RunnerUnavailableError, match=address):
                call()


def test_proxy_variables_are_ignored(runner: FakeRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with RunnerClient(runner.address) as client:
        assert client.complete("Hi").content == "Hello world"


def test_tokenize_and_detokenize_are_inverses(client: RunnerClient, runner: FakeRunner) -> None:
    assert client.detokenize(client.tokenize("h\u00e9\U0001f600")) == "h\u00e9\U0001f600"
    client.tokenize("x", add_special_tokens=True)
    assert runner.requests[-1] == pb.TokenizeRequest(content="x", add_special_tokens=True)


def test_status_health_and_ping_are_answered(client: RunnerClient) -> None:
    status = client.status()
    assert (status.state, status.progress) == (State.ACTIVE, 100)
    assert status.model is not None
    assert status.model.name == "fake"
    assert status.last_progress_age_seconds is None
    assert client.is_serving()
    assert client.is_serving("mlxrunner.v1.RunnerService")
    assert 0 < client.ping() < 5


def test_a_completion_after_unload_finds_no_model(client: RunnerClient) -> None:
    assert client.unload() == 0
    assert client.status().model is None
    with pytest.raises(errors.ModelNotLoadedError):
        client.complete("Hi")


def test_a_model_that_is_not_made_for_embeddings_is_not_supported(client: RunnerClient) -> None:
    for call in (lambda: client.embedding("Hi"), lambda: client.embed(["Hi"])):
        with pytest.raises(errors.NotSupportedError, match="does not embed") as caught:
            call()
        assert caught.value.reason == "MODEL_UNSUPPORTED"


@pytest.mark.parametrize("inputs", ["text", [1], [["x"]], [b"x"]])
def test_inputs_of_other_types_are_refused(client: RunnerClient, inputs: Any) -> None:
    with pytest.raises(TypeError, match="inputs"):
        client.embed(inputs)
    with pytest.raises(TypeError, match="content"):
        client.embedding(["x"])  # type: ignore[arg-type]


def test_a_call_to_embed_waits_as_long_as_a_first_token(runner: FakeRunner) -> None:
    """Embed with a usual deadline that is too short for many long texts."""
    runner.embedding_dimension = 2
    runner.embed_seconds = 0.5
    timeouts = Timeouts(call_seconds=0.05)
    with RunnerClient(runner.address, timeouts=timeouts) as client:
        assert client.embedding("Hi").token_count == 2
        with pytest.raises(errors.RunnerTimeoutError):
            client.embed(["Hi"], timeout_seconds=0.05)


def test_calls_on_a_closed_client_raise(client: RunnerClient) -> None:
    client.close()
    client.close()
    calls = (client.status, lambda: client.completion("Hi"), lambda: client.load("org/name"))
    for call in calls:
        with pytest.raises(errors.RunnerUnavailableError, match="is closed"):
            call()


def test_close_ends_the_calls_of_other_threads(client: RunnerClient, runner: FakeRunner) -> None:
    runner.stall_after, runner.load_seconds = 1, math.inf
    stream = client.completion("Hi")
    next(stream)
    caught: list[errors.RunnerError] = []

    def run(call: object) -> None:
        assert callable(call)
        try:
            call()
        except errors.RunnerError as error:
            caught.append(error)

    calls = (lambda: next(stream), lambda: client.load("org/name"))
    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    while client.status().state is not State.LOADING:
        pass
    client.close()
    for thread in threads:
        thread.join(10)
    assert [type(error) for error in caught] == [errors.RunnerUnavailableError] * 2
    assert all("is closed" in str(error) for error in caught)


def test_many_threads_share_a_client(client: RunnerClient) -> None:
    contents: list[str] = []

    def run() -> None:
        for _ in range(10):
            contents.append(client.complete("Hi").content)  # noqa: PERF401 - threads append

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert contents == ["Hello world"] * 80


def test_large_responses_are_received(client: RunnerClient, runner: FakeRunner) -> None:
    runner.pieces = ["x" * 8 * 2**20]
    assert len(client.complete("Hi").content) == 8 * 2**20


def test_large_prompts_are_sent(runner: FakeRunner, client: RunnerClient) -> None:
    client.complete("x" * 3 * 2**20)
    assert len(runner.requests) == 1


UNAVAILABLE = Failure("", code=grpc.StatusCode.UNAVAILABLE)


@pytest.mark.parametrize(
    ("call", "attempts"),
    [
        (lambda client: client.estimate("x"), 3),
        (lambda client: client.tokenize("x"), 3),
        (lambda client: client.detokenize([1]), 3),
        (lambda client: client.trim(), 1),
        (lambda client: client.unload(), 1),
        (lambda client: client.complete("x"), 1),
        (lambda client: client.load("x"), 1),
    ],
)
def test_only_read_only_calls_are_retried(
    call: Callable[[RunnerClient], object], attempts: int
) -> None:
    with fake_runner(failure=UNAVAILABLE) as runner, RunnerClient(runner.address) as client:
        with pytest.raises(errors.RunnerUnavailableError):
            call(client)
        assert len(runner.requests) == attempts


def test_status_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[pb.StatusRequest] = []

    def refuse_once(
        _self: FakeRunner, request: pb.StatusRequest, context: grpc.ServicerContext
    ) -> pb.StatusResponse:
        calls.append(request)
        if len(calls) == 1:
            UNAVAILABLE.abort(context)
        return pb.StatusResponse(progress=42)

    monkeypatch.setattr(FakeRunner, "Status", refuse_once)
    with fake_runner() as runner, RunnerClient(runner.address) as client:
        assert client.status().progress == 42
    assert len(calls) == 2
