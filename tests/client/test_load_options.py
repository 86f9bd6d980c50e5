"""``LoadOptions`` and its keywords: the same fields everywhere, all of them sent to the runner."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import (
    AsyncRunnerClient,
    LoadKeywords,
    LoadOptions,
    RunnerClient,
    RunnerProcess,
)
from runner_client.memory.estimation import estimate
from runner_client.testing import fake_runner
from runner_client.types import Dtype
from runner_common.server_options import SERVER_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from runner_client.testing import FakeRunner

FULL = LoadOptions(
    context_length=64,
    parallel=2,
    dtype="bfloat16",
    memory_limit_bytes=10**9,
    prefix_cache_bytes=0,
    memory_override=True,
    allow_inexact=True,
    kv_bits=8,
    adapters={"sql": "/adapters/sql", "fr": "/adapters/fr"},
    draft_model="org/draft",
)
FIELDS = {
    **asdict(FULL),
    "dtype": pb.DTYPE_BFLOAT16,
    "adapters": [pb.Adapter(name=name, path=path) for name, path in FULL.adapters.items()],
}
REQUEST = pb.LoadRequest(model="org/name", **FIELDS)


@pytest.fixture
def runner() -> Iterator[FakeRunner]:
    with fake_runner() as fake:
        yield fake


def test_keywords_and_options_have_the_same_fields() -> None:
    assert get_type_hints(LoadKeywords) == get_type_hints(LoadOptions)


def test_the_server_has_an_option_for_each_dtype() -> None:
    choices = next(option.choices for option in SERVER_OPTIONS if option.name == "dtype")
    assert choices == get_args(Dtype)


def test_options_and_keywords_send_the_same_load(runner: FakeRunner) -> None:
    with RunnerClient(runner.address) as client:
        client.load("org/name", options=FULL)
        client.load("org/name", **asdict(FULL))
        client.load("org/name", options=replace(FULL, parallel=7), parallel=2)
    assert runner.requests == [REQUEST] * 3


def test_a_loaded_draft_model_is_told(runner: FakeRunner) -> None:
    with RunnerClient(runner.address) as client:
        draft = client.load("org/name", draft_model="org/draft").model.draft_model
        assert draft
        assert draft.name == "org/draft"
        assert client.load("org/name").model.draft_model is None


def test_a_draft_model_is_named_by_text() -> None:
    with pytest.raises(TypeError, match="draft_model"):
        LoadOptions(draft_model=7)  # type: ignore[arg-type]


async def test_options_and_keywords_send_the_same_estimate(runner: FakeRunner) -> None:
    async with AsyncRunnerClient(runner.address) as client:
        await client.estimate("org/name", options=FULL)
        await client.estimate("org/name", **asdict(FULL))
    fields = {name: value for name, value in FIELDS.items() if name != "memory_override"}
    assert runner.requests == [pb.EstimateRequest(model="org/name", **fields)] * 2


@pytest.mark.parametrize("call", [RunnerProcess, estimate])
def test_an_unknown_keyword_is_refused(call: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="contxt_length"):
        call("org/name", contxt_length=1)
