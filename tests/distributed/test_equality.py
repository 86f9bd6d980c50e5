"""Ranks together generate the same tokens as one process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from support.embedding_models import say_that_it_embeds
from support.rank_processes import DEMO, THREE_HEADS, Ranks, completion, ranks
from support.server_child import DEADLINE_SECONDS, Child

pytestmark = pytest.mark.mlx

Build = Callable[..., Path]

LONG = [7 * i % 2000 + 10 for i in range(300)]
"""Prompt of several chunks."""

RECORD = pb.Constraint(
    json_schema='{"type": "array", "items": {"enum": ["a", 1]}, "minItems": 3, "maxItems": 5}'
)

REQUESTS = {
    "greedy": completion("def main(", temperature=0, num_predict=32),
    "seeded": completion("class Parser:", seed=11, num_predict=16),
    "nucleus": completion("import os\n", seed=5, top_k=0, top_p=0.8, num_predict=12),
    "penalties": completion("return", temperature=0, repeat_penalty=1.3, num_predict=12),
    "biased": completion("return", temperature=0, logit_bias={0: -100, 1: -100}, num_predict=12),
    "stopped": completion("def main(", temperature=0, stop_token_ids=range(300, 400)),
    "not too short": completion(
        "return", temperature=0, logit_bias={0: 100, 1: 100}, min_predict=9, num_predict=12
    ),
    "constrained": completion("x = ", seed=3, constraint=RECORD),
    "long": completion(LONG, temperature=0, num_predict=8),
}


def tokens(messages: Iterable[pb.CompletionResponse]) -> list[int]:
    """Return the token ids of a stream, which must end with ``done``."""
    seen = list(messages)
    assert seen[-1].done
    return [id_ for message in seen for id_ in message.token_ids]


def generated(server: Child, requests: Iterable[pb.CompletionRequest]) -> list[list[int]]:
    """Return the tokens generated for each request, one after the other."""
    complete = server.stub.Completion
    return [tokens(complete(request, timeout=DEADLINE_SECONDS)) for request in requests]


def assert_prompt_logprobs_close(
    alone: Child, together: Child, request: pb.CompletionRequest
) -> None:
    """Compare the log probabilities of a prompt of token ids, and the tokens after it."""
    whole, split = (
        list(server.stub.Completion(request, timeout=DEADLINE_SECONDS))
        for server in (alone, together)
    )
    assert tokens(whole) == tokens(split)
    assert split[-1].prompt_cached_count == 0
    some, others = (
        [entry.logprob for message in messages for entry in message.prompt_logprobs]
        for messages in (whole, split)
    )
    assert len(some) == len(request.prompt_token_ids.ids) - 1
    assert others == pytest.approx(some, abs=1e-3)


@pytest.fixture(scope="module")
def expected(alone: Child) -> dict[str, list[int]]:
    """Tokens of one process for each request."""
    alone.load(DEMO)
    return dict(zip(REQUESTS, generated(alone, REQUESTS.values()), strict=True))


@pytest.fixture(scope="module")
def pair(two: Ranks) -> Child:
    """Two ranks with the demo model, reached through the first."""
    two.first.load(DEMO)
    return two.first


@pytest.mark.parametrize("name", REQUESTS)
def test_two_ranks_generate_the_same_as_one_process(
    pair: Child, expected: dict[str, list[int]], name: str
) -> None:
    assert generated(pair, [REQUESTS[name]]) == [expected[name]]


def test_overlapping_streams_generate_the_same_as_one_process(
    pair: Child, expected: dict[str, list[int]]
) -> None:
    calls = {"greedy": pair.stub.Completion(REQUESTS["greedy"], timeout=DEADLINE_SECONDS)}
    begun = [next(calls["greedy"]) for _ in range(2)]
    gone = pair.complete(400)
    for name in ("long", "seeded", "nucleus", "penalties", "biased", "constrained"):
        calls[name] = pair.stub.Completion(REQUESTS[name], timeout=DEADLINE_SECONDS)
    while not next(gone).token_ids:
        pass
    gone.cancel()  # type: ignore[attr-defined]  # a call of gRPC
    first = [id_ for message in begun for id_ in message.token_ids]
    assert first + tokens(calls.pop("greedy")) == expected["greedy"]
    for name, call in calls.items():
        assert tokens(call) == expected[name], name
    pair.wait_for(lambda: pair.status().running_count == 0)


def test_a_row_without_a_legal_token_ends_on_every_rank(
    pair: Child, expected: dict[str, list[int]]
) -> None:
    stuck = pb.Constraint(lark=r'start: "ab" x' + "\n" + r"x: /[^\s\S]/")
    call = pair.stub.Completion(completion("x", constraint=stuck), timeout=DEADLINE_SECONDS)
    beside = pair.stub.Completion(REQUESTS["constrained"], timeout=DEADLINE_SECONDS)
    with pytest.raises(grpc.RpcError, match="no token can continue"):
        list(call)
    assert tokens(beside) == expected["constrained"]
    assert generated(pair, [REQUESTS["long"]]) == [expected["long"]]


def test_ranks_reuse_cached_prompts_alike(pair: Child, expected: dict[str, list[int]]) -> None:
    generated(pair, [REQUESTS["long"]])
    *_, last = pair.stub.Completion(REQUESTS["long"], timeout=DEADLINE_SECONDS)
    assert last.prompt_cached_count == len(LONG) - 1
    assert generated(pair, [REQUESTS["long"]]) == [expected["long"]]


def test_log_probabilities_match_one_process(alone: Child, pair: Child) -> None:
    alone.load(DEMO)
    request = completion("def", temperature=0, num_predict=8, logprobs=3)
    request.logprob_token_ids.extend([300, 7])
    found = [
        [entry for message in server.stub.Completion(request) for entry in message.logprobs]
        for server in (alone, pair)
    ]
    whole, split = ([entry.logprob for entry in entries] for entries in found)
    assert split == pytest.approx(whole, abs=1e-4)
    assert [e.top[1].token_id for e in found[0]] == [e.top[1].token_id for e in found[1]]
    whole, split = ([each.logprob for e in found[i] for each in e.candidates] for i in (0, 1))
    assert len(whole) == 2 * len(found[0])
    assert split == pytest.approx(whole, abs=1e-4)


def test_log_probabilities_of_a_prompt_match_one_process(alone: Child, pair: Child) -> None:
    """The prompt is in the prefix cache of all ranks, and has several chunks."""
    alone.load(DEMO)
    generated(pair, [REQUESTS["long"]])
    request = completion(LONG, temperature=0, num_predict=4)
    request.prompt_logprobs = 2
    assert_prompt_logprobs_close(alone, pair, request)


def test_ranks_keep_salts_and_requests_without_the_cache_apart(pair: Child) -> None:
    request = completion(LONG[::-1], temperature=0, num_predict=2)
    cached = []
    for salt, bypasses in (("a", False), ("b", False), ("a", True), ("a", False)):
        request.cache_salt, request.bypass_prefix_cache = salt, bypasses
        *_, last = pair.stub.Completion(request, timeout=DEADLINE_SECONDS)
        cached.append(last.prompt_cached_count)
    assert cached == [0, 0, 0, len(LONG) - 1]


def test_each_rank_holds_a_part_of_the_weights(
    alone: Child, pair: Child, expected: dict[str, list[int]]
) -> None:
    assert expected
    whole, status = alone.status(), pair.status()
    assert [rank.rank for rank in status.ranks] == [0, 1]
    assert status.model.capabilities.rank_count == 2
    assert status.ranks[0].pid == status.pid
    assert len({rank.pid for rank in status.ranks}) == 2
    assert all(rank.device == status.device and rank.host for rank in status.ranks)
    assert status.model.weight_bytes < 0.7 * whole.model.weight_bytes
    pair.wait_for(lambda: pair.status().ranks[1].memory_usage.limit_bytes > 0)
    held = pair.status().ranks[1].memory_usage
    assert status.model.weight_bytes <= held.active_bytes < whole.model.weight_bytes
    assert not whole.ranks


def test_ranks_give_the_vectors_of_one_process(
    alone: Child, pair: Child, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    path = say_that_it_embeds(Path(shutil.copytree(DEMO, tmp_path / "demo")))
    texts = [LONG, LONG[:20], LONG[5:24], LONG[:1]]
    inputs = [pb.EmbedInput(token_ids=pb.TokenIds(ids=text)) for text in texts]
    found = []
    for server in (alone, pair):
        server.load(path)
        answer = server.stub.Embed(pb.EmbedRequest(inputs=inputs), timeout=DEADLINE_SECONDS)
        found.append([list(each.values) for each in answer.embeddings])
        assert generated(server, [REQUESTS["greedy"]]) == [expected["greedy"]]
        server.load(DEMO)
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=2e-5)


def test_ranks_with_quantized_caches_generate_the_same_as_one_process(
    alone: Child, pair: Child
) -> None:
    found = []
    for server in (alone, pair):
        server.load(DEMO, kv_bits=4)
        assert server.status().model.kv_bits == 4
        call = server.stub.Completion(REQUESTS["long"], timeout=DEADLINE_SECONDS)
        found.append([*generated(server, [REQUESTS["greedy"], REQUESTS["seeded"]]), tokens(call)])
        server.load(DEMO)
    assert found[0] == found[1]


QUANTIZABLE = {**THREE_HEADS, "hidden_size": 192, "intermediate_size": 384, "head_dim": 32}
"""Sizes with whole groups of 32 weights for each of three ranks."""

SHORT = [
    completion("def main(", temperature=0, num_predict=6),
    completion([id_ % 500 for id_ in LONG[:150]], seed=4, num_predict=6),
]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Three ranks without a model."""
    with ranks(tmp_path_factory.mktemp("three"), 3) as started:
        yield started


@pytest.mark.parametrize(
    ("quantize_bits", "dtype"),
    [(None, pb.DTYPE_AUTO), (4, pb.DTYPE_AS_STORED), (4, pb.DTYPE_FLOAT32)],
)
def test_three_ranks_generate_the_same_as_one_process(
    alone: Child,
    three: Ranks,
    model_dir: Build,
    quantize_bits: int | None,
    dtype: pb.Dtype.ValueType,
) -> None:
    model = model_dir("llama", quantize_bits=quantize_bits, **QUANTIZABLE)
    load = pb.LoadRequest(model=str(model), dtype=dtype)
    for server in (alone, three.first):
        server.stub.Load(load, timeout=DEADLINE_SECONDS)
    calls = [three.first.stub.Completion(each, timeout=DEADLINE_SECONDS) for each in SHORT]
    assert [tokens(call) for call in calls] == generated(alone, SHORT)


@pytest.mark.exhaustive
def test_three_ranks_split_layers(alone: Child, model_dir: Build, tmp_path: Path) -> None:
    # Four layers: one rank gets two.
    sizes = {"num_hidden_layers": 4, "head_dim": 32, "hidden_size": 128}
    model = model_dir("llama", model_type="qwen2", **sizes)
    with ranks(tmp_path, 3, "--pipeline") as three:
        for server in (alone, three.first):
            server.load(model, kv_bits=8)
        calls = [three.first.stub.Completion(each, timeout=DEADLINE_SECONDS) for each in SHORT]
        assert [tokens(call) for call in calls] == generated(alone, SHORT)
        for server in (alone, three.first):
            server.load(model)
        calls = [three.first.stub.Completion(each, timeout=DEADLINE_SECONDS) for each in SHORT]
        assert [tokens(call) for call in calls] == generated(alone, SHORT)
        request = completion(SHORT[1].prompt_token_ids.ids, temperature=0, num_predict=4)
        request.prompt_logprobs = 2
        assert_prompt_logprobs_close(alone, three.first, request)
        parts = three.first.status().model.weight_bytes, alone.status().model.weight_bytes
        assert parts[0] < parts[1]
