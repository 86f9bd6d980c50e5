"""Tokens, prompts and outputs appear in no log line, command line or status."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import Options, RunnerClient, errors
from runner_common.contract import TOKEN_VARIABLE
from support.harness import Server, StartServer, failure
from support.server_child import Child, running

TOKEN = "correct-horse-battery-staple"  # noqa: S105 - of a test
PROMPT = "my secret diary: the treasure lies under the old oak"
STOP = "never-in-a-log-stop-string"


def substrings(text: str, length: int = 12) -> list[str]:
    """Return the substrings of a length unlikely to occur in a log by chance."""
    return [text[i : i + length] for i in range(max(1, len(text) - length))]


def assert_hidden(text: str, log: str) -> None:
    assert not [part for part in substrings(text) if part in log or repr(part)[1:-1] in log]


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """A real server logging at DEBUG."""
    pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
    folder = tmp_path_factory.mktemp("logs")
    with running(folder, "--log-level", "DEBUG", **{TOKEN_VARIABLE: TOKEN}) as started:
        yield started


@pytest.mark.mlx
def test_a_real_server_logs_no_text_and_no_token(
    child: Child, model_dir: Callable[..., Path]
) -> None:
    model = str(model_dir())
    with RunnerClient(child.ready.target, token=TOKEN) as client:
        client.load(model, context_length=256)
        # A temperature of 1 draws tokens with letters, so that the output can be searched for.
        options = Options(num_predict=60, temperature=1, seed=5, stop=(STOP,))
        output = client.complete(PROMPT, options=options, logprobs=2, request_id="visible").content
        assert len(output.strip()) > 12
        client.detokenize(client.tokenize(PROMPT))
        for text, wrong in (
            (PROMPT * 100, Options()),
            (PROMPT, Options(temperature=-1)),
            (PROMPT, Options(stop=(STOP * 100,))),
        ):
            with pytest.raises(errors.InvalidRequestError):
                client.complete(text, options=wrong)
        with client.completion(PROMPT, options=Options(num_predict=200)) as stream:
            next(iter(stream))
        status = repr(client.status())
    with (
        RunnerClient(child.ready.target, token=f"{TOKEN}-wrong") as stranger,
        pytest.raises(errors.AuthenticationError),
    ):
        stranger.complete(PROMPT)
    child.process.send_signal(signal.SIGINT)
    arguments = psutil.Process(child.process.pid).cmdline()
    assert child.wait() == 0
    log = child.log.read_text()
    assert "DEBUG" in log
    for secret in (PROMPT, STOP, output, TOKEN):
        assert_hidden(secret, log)
        assert_hidden(secret, status)
        assert_hidden(secret, " ".join(arguments))


@pytest.mark.parametrize("token", [None, TOKEN])
async def test_failures_log_no_text(
    start_server: StartServer, caplog: pytest.LogCaptureFixture, token: str | None
) -> None:
    """Search the log after a failed step and after unauthenticated calls."""
    caplog.set_level(logging.DEBUG)
    server = await start_server(token=token)
    metadata = [("authorization", f"Bearer {token}")] if token else []
    await server.stub.Load(pb.LoadRequest(model="fake"), metadata=metadata)
    request = pb.CompletionRequest(prompt=PROMPT, options=pb.CompletionOptions(stop=[STOP]))
    server.backend.failures.append(RuntimeError("broken"))
    assert (await failure(server.stub.Completion(request, metadata=metadata))).reason
    await assert_strangers_refused(server, request, token)
    assert "step failed" in caplog.text
    for secret in (PROMPT, STOP, TOKEN):
        assert_hidden(secret, caplog.text)


async def assert_strangers_refused(
    server: Server, request: pb.CompletionRequest, token: str | None
) -> None:
    if token is None:
        return
    for sent in ((), [("authorization", f"Bearer {token}x")]):
        problem = await failure(server.stub.Completion(request, metadata=sent))
        assert problem.code is grpc.StatusCode.UNAUTHENTICATED
