"""Every row of the error table, raised by real calls, sync and async."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import AsyncRunnerClient, RunnerClient, errors
from runner_client.rpc.transport import translate
from runner_client.testing import Failure, fake_runner

# Any, because each row's class has attributes of its own.
ErrorOf = Callable[[Failure], Any]

BY_REASON = [
    ("INVALID_FIELD", errors.InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT),
    ("PROMPT_TOO_LONG", errors.PromptTooLongError, grpc.StatusCode.INVALID_ARGUMENT),
    ("MODEL_NOT_FOUND", errors.ModelNotFoundError, grpc.StatusCode.NOT_FOUND),
    ("MODEL_UNSUPPORTED", errors.ModelUnsupportedError, grpc.StatusCode.FAILED_PRECONDITION),
    ("MODEL_NOT_LOADED", errors.ModelNotLoadedError, grpc.StatusCode.FAILED_PRECONDITION),
    ("BUSY", errors.BusyError, grpc.StatusCode.FAILED_PRECONDITION),
    ("INSUFFICIENT_MEMORY", errors.InsufficientMemoryError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ("QUEUE_FULL", errors.QueueFullError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ("SHUTTING_DOWN", errors.ShuttingDownError, grpc.StatusCode.UNAVAILABLE),
    ("GENERATION_FAILED", errors.GenerationFailedError, grpc.StatusCode.INTERNAL),
    ("UNAUTHENTICATED", errors.AuthenticationError, grpc.StatusCode.UNAUTHENTICATED),
    ("ABORTED", errors.RequestAbortedError, grpc.StatusCode.ABORTED),
    ("PERMISSION_DENIED", errors.PermissionDeniedError, grpc.StatusCode.PERMISSION_DENIED),
]

BY_CODE = [
    (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequestError),
    (grpc.StatusCode.DEADLINE_EXCEEDED, errors.RunnerTimeoutError),
    (grpc.StatusCode.UNAVAILABLE, errors.RunnerUnavailableError),
    (grpc.StatusCode.CANCELLED, errors.RunnerUnavailableError),
    (grpc.StatusCode.UNIMPLEMENTED, errors.NotSupportedError),
    (grpc.StatusCode.UNAUTHENTICATED, errors.AuthenticationError),
    (grpc.StatusCode.PERMISSION_DENIED, errors.PermissionDeniedError),
    (grpc.StatusCode.INTERNAL, errors.RunnerError),
    (grpc.StatusCode.UNKNOWN, errors.RunnerError),
    (grpc.StatusCode.NOT_FOUND, errors.RunnerError),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.RunnerError),
]


def sync_error(failure: Failure) -> errors.RunnerError:
    with fake_runner(failure=failure) as runner, RunnerClient(runner.address) as client:
        with pytest.raises(errors.RunnerError) as unary:
            client.unload()
        with pytest.raises(errors.RunnerError) as stream:
            client.complete("Hi")
    assert type(unary.value) is type(stream.value)
    assert isinstance(unary.value.__cause__, grpc.RpcError)
    return stream.value


def async_error(failure: Failure) -> errors.RunnerError:
    async def call(address: str) -> errors.RunnerError:
        async with AsyncRunnerClient(address) as client:
            with pytest.raises(errors.RunnerError) as unary:
                await client.unload()
            with pytest.raises(errors.RunnerError) as stream:
                await client.complete("Hi")
        assert type(unary.value) is type(stream.value)
        assert isinstance(unary.value.__cause__, grpc.RpcError)
        return stream.value

    with fake_runner(failure=failure) as runner:
        return asyncio.run(call(runner.address))


both = pytest.mark.parametrize("error_of", [sync_error, async_error])


def test_the_table_has_every_reason_of_the_proto() -> None:
    reasons = {name.removeprefix("ERROR_REASON_") for name in pb.ErrorReason.keys()}  # noqa: SIM118 - an enum wrapper does not iterate
    assert set(translate._BY_REASON) == reasons - {"UNSPECIFIED"} == {row[0] for row in BY_REASON}


@both
@pytest.mark.parametrize(("reason", "kind", "code"), BY_REASON)
def test_a_reason_decides_the_class(
    error_of: ErrorOf, reason: str, kind: type[errors.RunnerError], code: grpc.StatusCode
) -> None:
    error = error_of(Failure(reason, "said why", metadata={"someBytes": "7"}))
    assert type(error) is kind
    assert (str(error), error.reason, error.code) == ("said why", reason, code)
    assert error.metadata == {"someBytes": "7"}


@both
@pytest.mark.parametrize(("code", "kind"), BY_CODE)
def test_without_a_reason_the_code_decides(
    error_of: ErrorOf, code: grpc.StatusCode, kind: type[errors.RunnerError]
) -> None:
    error = error_of(Failure("", "said why", code=code))
    assert type(error) is kind
    assert error.reason is None
    assert error.code is code
    assert "said why" in str(error)


@pytest.mark.parametrize(("code", "kind"), BY_CODE)
def test_an_unknown_reason_is_kept_and_the_code_decides(
    code: grpc.StatusCode, kind: type[errors.RunnerError]
) -> None:
    error = sync_error(Failure("FROM_THE_FUTURE", "said why", code=code))
    assert type(error) is kind
    assert error.reason == "FROM_THE_FUTURE"
    assert str(error) == "said why"


def test_a_reason_of_another_domain_is_ignored() -> None:
    code = grpc.StatusCode.UNAVAILABLE
    error = sync_error(Failure("BUSY", "a proxy", code=code, domain="proxy.example"))
    assert type(error) is errors.RunnerUnavailableError
    assert error.reason is None


@both
def test_field_violations_are_read(error_of: ErrorOf) -> None:
    violations = (("options.top_k", "must be at most 4096"), ("prompt", "is empty"))
    error = error_of(Failure("INVALID_FIELD", field_violations=violations))
    assert error.field_violations == violations


@both
def test_prompt_numbers_are_read(error_of: ErrorOf) -> None:
    metadata = {"promptTokens": "5000", "contextLength": "4096"}
    error = error_of(Failure("PROMPT_TOO_LONG", metadata=metadata))
    assert (error.prompt_tokens, error.context_length) == (5000, 4096)
    assert isinstance(error, errors.InvalidRequestError)


@both
def test_memory_numbers_are_read(error_of: ErrorOf) -> None:
    metadata = {"requiredBytes": "8000000000", "availableBytes": "7000000000"}
    error = error_of(Failure("INSUFFICIENT_MEMORY", metadata=metadata))
    assert (error.required_bytes, error.available_bytes) == (8_000_000_000, 7_000_000_000)
    assert error.overhead_bytes is None


@both
def test_the_retry_delay_is_read(error_of: ErrorOf) -> None:
    error = error_of(Failure("QUEUE_FULL", retry_delay_seconds=2.5))
    assert error.retry_delay_seconds == 2.5


@both
def test_the_model_is_read(error_of: ErrorOf) -> None:
    error = error_of(Failure("MODEL_NOT_FOUND", metadata={"model": "org/name"}))
    assert error.model == "org/name"


@pytest.mark.parametrize("number", ["", "many", "-1", "1.5"])
def test_an_invalid_number_is_left_out(number: str) -> None:
    error = sync_error(Failure("INSUFFICIENT_MEMORY", metadata={"requiredBytes": number}))
    assert isinstance(error, errors.InsufficientMemoryError)
    assert error.required_bytes is None
    assert error.metadata == {"requiredBytes": number}


def test_details_that_cannot_be_decoded_are_left_out() -> None:
    class Strange(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.INTERNAL

        def details(self) -> str:
            return "said why"

        def trailing_metadata(self) -> tuple[object, ...]:  # type: ignore[override]  # the stubs know no pairs
            return (("grpc-status-details-bin", b"\xff\xff\xff"),)

    error = translate.translate(Strange(), address="a")
    assert type(error) is errors.RunnerError
    assert (str(error), error.reason) == ("said why", None)
