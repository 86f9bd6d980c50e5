"""Adapters over the wire, with the demo model."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from support.adapters import mlx_lm_tokens, write_adapter, write_config
from support.harness import Server, failure, tokens

from .conftest import DEMO

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

PROMPT = [5 * i % 400 + 20 for i in range(200)]
COUNT = 12


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for the demo model."""
    return write_adapter(tmp_path_factory.mktemp("adapters") / "one", DEMO, rank=8, scale=4.0)


async def _complete(server: Server, adapter: str) -> tuple[list[int], int]:
    """Return the tokens, and how many of the prompt were cached."""
    request = pb.CompletionRequest(
        prompt_token_ids=pb.TokenIds(ids=PROMPT),
        adapter=adapter,
        options=pb.CompletionOptions(temperature=0, num_predict=COUNT, ignore_eos=True),
    )
    messages = [message async for message in server.stub.Completion(request)]
    return tokens(messages), messages[-1].prompt_cached_count


async def test_completions_have_the_tokens_of_mlx_lm(demo: Server, adapter: Path) -> None:
    named = [pb.Adapter(name="one", path=str(adapter))]
    await demo.load(str(DEMO), context_length=256, prefix_cache_bytes=2**26, adapters=named)
    assert list((await demo.status()).model.adapters) == named
    expected = {
        "": mlx_lm_tokens(DEMO, None, PROMPT, COUNT),
        "one": mlx_lm_tokens(DEMO, adapter, PROMPT, COUNT),
    }
    assert expected[""] != expected["one"]
    for is_cached in (False, True):
        for name, ids in expected.items():
            found, cached = await _complete(demo, name)
            assert (found, cached > 0) == (ids, is_cached)


async def test_an_adapter_that_does_not_fit_costs_nothing(
    demo: Server, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapters.safetensors").write_bytes((adapter / "adapters.safetensors").read_bytes())
    parameters = {"rank": 9, "scale": 4.0}
    write_config(tmp_path, num_layers=-1, lora_parameters=parameters)
    named = [pb.Adapter(name="bad", path=str(tmp_path))]
    problem = await failure(demo.load(str(DEMO), context_length=256, adapters=named))
    assert problem.reason == "MODEL_UNSUPPORTED"
    assert "the adapter 'bad' in" in problem.message
    assert ".lora_a has the shape" in problem.message
    named[0].path = str(tmp_path / "none")
    problem = await failure(demo.load(str(DEMO), context_length=256, adapters=named))
    assert problem.reason == "INVALID_FIELD"
    assert [*problem.violations] == ["adapters[0].path"]
    status = await demo.status()
    assert (status.state, status.model.path) == (pb.STATE_ACTIVE, str(DEMO))
    assert len((await _complete(demo, ""))[0]) == COUNT


async def test_an_estimate_counts_the_adapters(demo: Server, adapter: Path) -> None:
    def request(*adapters: pb.Adapter) -> pb.EstimateRequest:
        return pb.EstimateRequest(model=str(DEMO), context_length=256, adapters=adapters)

    without = await demo.stub.Estimate(request())
    adapted = await demo.stub.Estimate(request(pb.Adapter(name="one", path=str(adapter))))
    more = adapted.weight_bytes - without.weight_bytes
    header_bytes = 8192
    size = (adapter / "adapters.safetensors").stat().st_size
    assert size - header_bytes < more < size
    assert adapted.total_bytes >= without.total_bytes + more
