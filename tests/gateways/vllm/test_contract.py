"""Scenario of ``vllm.grpc.engine.VllmEngine``: every rpc and field, on the demo model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from mlxrunner.v1 import runner_pb2
from runner_server.telemetry.methods import METHODS, VLLM_SERVICE_NAME
from support.server_child import Child, running

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
pytest.importorskip("smg_grpc_proto", reason="smg-grpc-proto is not installed (the extra smg)")

from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2
from tokenizers import Tokenizer

pytestmark = pytest.mark.mlx

DEMO = Path(__file__).parents[3] / "runner_server" / "demo" / "model"
DEADLINE_SECONDS = 60.0
CHAT = "<|user|>\nTell me a story.<|end|>\n<|assistant|>\n"


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """A runner with the demo model."""
    directory = tmp_path_factory.mktemp("vllm")
    with running(directory, "--vllm", "--model", str(DEMO)) as started:
        started.wait_for(partial(_is_loaded, started))
        yield started


def _is_loaded(child: Child) -> bool:
    return child.status().state == runner_pb2.STATE_ACTIVE


@pytest.fixture(scope="module")
def stub(child: Child) -> Any:
    """The contract's own stub."""
    return vllm_engine_pb2_grpc.VllmEngineStub(child.channel)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def request(prompt: str = CHAT, **options: Any) -> Any:
    outer = {
        name: options.pop(name)
        for name in ("stream", "request_id", "data_parallel_rank")
        if name in options
    }
    params = {"temperature": 0, "max_tokens": 16, **options}
    return pb.GenerateRequest(text=prompt, sampling_params=pb.SamplingParams(**params), **outer)


def answers(stub: Any, **options: Any) -> list[Any]:
    return list(stub.Generate(request(**options), timeout=DEADLINE_SECONDS))


def whole(stub: Any, **options: Any) -> Any:
    (message,) = answers(stub, **options)
    return message.complete


def refusal(stub: Any, sent: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(sent, timeout=DEADLINE_SECONDS))
    return caught.value


def test_method_names_match_the_contract() -> None:
    service = pb.DESCRIPTOR.services_by_name["VllmEngine"]
    assert service.full_name == VLLM_SERVICE_NAME
    paths = {path for path in METHODS if path.startswith(f"/{VLLM_SERVICE_NAME}/")}
    assert paths == {f"/{VLLM_SERVICE_NAME}/{method.name}" for method in service.methods}
    assert len(set(METHODS.values())) == len(METHODS)


def test_a_stream_has_the_tokens_of_the_whole_answer(stub: Any) -> None:
    alone = whole(stub)
    assert (alone.finish_reason, alone.completion_tokens) == ("length", 16)
    *chunks, last = answers(stub, stream=True)
    ids = [token_id for message in chunks for token_id in message.chunk.token_ids]
    assert ids == list(alone.output_ids)
    assert not last.complete.output_ids
    assert (last.complete.completion_tokens, last.complete.finish_reason) == (16, "length")
    # The second request finds the prompt of the first.
    assert last.complete.cached_tokens == last.complete.prompt_tokens - 1


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_differ_and_repeat_with_their_seed(stub: Any, *, stream: bool) -> None:
    def texts(seed: int) -> list[list[int]]:
        found: list[list[int]] = [[], [], []]
        ended = []
        sent = {"n": 3, "temperature": 1.0, "seed": seed, "stream": stream, "ignore_eos": True}
        for message in answers(stub, **sent):
            part = message.chunk if message.HasField("chunk") else message.complete
            found[part.index] += part.token_ids if part is message.chunk else part.output_ids
            if message.HasField("complete"):
                ended.append(part.index)
        assert sorted(ended) == [0, 1, 2]
        return found

    first = texts(7)
    assert texts(7) == first
    assert len({tuple(ids) for ids in first}) == 3
    assert all(len(ids) == 16 for ids in first)


def test_a_stop_string_ends_the_answer(stub: Any, tokenizer: Any) -> None:
    text = tokenizer.decode(whole(stub).output_ids)
    stop = text.split()[3]
    ended = whole(stub, stop=[stop])
    assert (ended.finish_reason, ended.matched_stop_str) == ("stop", stop)
    assert ended.completion_tokens < 16
    assert stop in tokenizer.decode(ended.output_ids)


def test_a_stop_token_ends_the_answer_unless_min_tokens_forbids_it(stub: Any) -> None:
    third = whole(stub).output_ids[2]
    ended = whole(stub, stop_token_ids=[third])
    assert (ended.completion_tokens, ended.matched_token_id) == (3, third)
    assert whole(stub, stop_token_ids=[third], min_tokens=5).completion_tokens >= 5


def test_ignore_eos_goes_on(stub: Any) -> None:
    likely = {"logit_bias": {1: 100.0}}
    ended = whole(stub, **likely)
    assert (ended.finish_reason, list(ended.output_ids)) == ("stop", [1])
    assert ended.WhichOneof("matched_stop") is None
    assert whole(stub, **likely, ignore_eos=True).completion_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_prompt_and_answer(stub: Any, tokenizer: Any, *, stream: bool) -> None:
    sent = {"logprobs": 2, "prompt_logprobs": 2, "max_tokens": 4, "stream": stream}
    messages = answers(stub, **sent)
    parts = [m.chunk if m.HasField("chunk") else m.complete for m in messages]
    of_output = [part.output_logprobs for part in parts if part.HasField("output_logprobs")]
    assert sum(len(entry.token_ids) for entry in of_output) == 4
    for entry in of_output:
        for token_id, logprob, top in zip(
            entry.token_ids, entry.token_logprobs, entry.top_logprobs, strict=True
        ):
            # Without temperature the likeliest token is drawn.
            assert (token_id, len(top.values)) == (top.token_ids[0], 2)
            assert logprob == pytest.approx(top.values[0])
    (of_prompt,) = [part.input_logprobs for part in parts if part.HasField("input_logprobs")]
    assert list(of_prompt.token_ids) == tokenizer.encode(CHAT).ids
    first, *others = of_prompt.token_logprobs
    assert not first.HasField("value")
    assert all(entry.value < 0 for entry in others)
    assert [len(top.values) for top in of_prompt.top_logprobs] == [0] + [2] * len(others)


SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"json_schema": json.dumps(SCHEMA)}, r'\{\s*"age":\s*[1-9]\s*\}'),
        ({"json_object": True}, r"\{.*"),
        ({"regex": "[0-9]{3}-[a-f]{2}"}, r"[0-9]{3}-[a-f]{2}"),
        ({"grammar": 'start: "yes" | "no"'}, r"yes|no"),
        ({"choice": pb.ChoiceConstraint(choices=["red", "green"])}, r"red|green"),
    ],
)
def test_structured_output(stub: Any, tokenizer: Any, constraint: Any, pattern: str) -> None:
    answer = whole(stub, max_tokens=40, grammar_from_first_token=True, **constraint)
    text = tokenizer.decode(answer.output_ids, skip_special_tokens=True)
    assert re.fullmatch(pattern, text, re.DOTALL)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"structural_tag": "{}"}, "sampling_params.structural_tag"),
        ({"grammar": 'root ::= "yes"'}, "sampling_params.grammar"),
        ({"grammar": "start: ("}, "sampling_params.grammar"),
        ({"json_schema": "{"}, "sampling_params.json_schema"),
        ({"choice": pb.ChoiceConstraint()}, "sampling_params.choice.choices"),
        ({"regex": "a", "ignore_eos": True}, "sampling_params.ignore_eos"),
        ({"regex": "a", "min_tokens": 1}, "sampling_params.min_tokens"),
        ({"min_tokens": 17}, "sampling_params.min_tokens"),
        ({"truncate_prompt_tokens": -1}, "sampling_params.truncate_prompt_tokens"),
        ({"logprobs": -1}, "sampling_params.logprobs"),
        ({"prompt_logprobs": 21}, "sampling_params.prompt_logprobs"),
        ({"n": 65}, "sampling_params.n"),
        ({"stop": [""]}, "sampling_params.stop[0]"),
        ({"data_parallel_rank": 1}, "data_parallel_rank"),
    ],
)
def test_what_is_not_served_is_refused_by_name(stub: Any, options: Any, field: str) -> None:
    error: Any = refusal(stub, request(**options))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"{field}:" in error.details()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kv_transfer_params", pb.KvTransferParams(remote_port=1)),
        ("kv_transfer_params_json", "{}"),
        ("mm_inputs", pb.MultimodalInputs()),
        ("extra_mm_inputs", [pb.MultimodalInputs()]),
        ("media_refs", pb.MediaRefs()),
    ],
)
def test_other_inputs_are_refused_by_name(stub: Any, field: str, value: Any) -> None:
    sent = request()
    sent.MergeFrom(pb.GenerateRequest(**{field: value}))
    error: Any = refusal(stub, sent)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"{field}:" in error.details()


def test_abort_ends_all_answers_of_a_request(stub: Any, child: Child) -> None:
    sent = request(request_id="mine", stream=True, n=2, max_tokens=900, ignore_eos=True)
    call = stub.Generate(sent, timeout=DEADLINE_SECONDS)
    assert next(call).HasField("chunk")
    stub.Abort(pb.AbortRequest(request_ids=["other", "mine"]), timeout=DEADLINE_SECONDS)
    ends = [message.complete for message in call if message.HasField("complete")]
    assert [end.finish_reason for end in ends] == ["abort", "abort"]
    child.wait_for(lambda: child.status().running_count == 0)


def test_a_cancelled_call_ends_all_its_answers(stub: Any, child: Child) -> None:
    sent = request(stream=True, n=3, max_tokens=900, ignore_eos=True)
    call = stub.Generate(sent, timeout=DEADLINE_SECONDS)
    next(call)
    call.cancel()
    child.wait_for(lambda: child.status().running_count == 0)


def test_information_about_model_and_server(stub: Any) -> None:
    assert stub.HealthCheck(pb.HealthCheckRequest()).healthy
    info = stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.served_model_name, info.is_generation) == ("model", True)
    assert info.max_context_length == info.max_req_input_len + 1 == 1024
    assert list(info.eos_token_ids) == [0, 1]
    server = stub.GetServerInfo(pb.GetServerInfoRequest())
    assert (server.server_type, server.data_parallel_size) == ("mlx-grpc-runner", 1)
    assert server.max_num_seqs >= 1
    (load,) = stub.GetLoads(pb.GetLoadsRequest()).loads
    assert (load.num_running_reqs, load.max_running_requests) == (0, server.max_num_seqs)
    assert not stub.GetLoads(pb.GetLoadsRequest(dp_rank=1)).loads


def test_the_tokenizer_can_be_fetched(stub: Any) -> None:
    *_, last = stub.GetTokenizer(common_pb2.GetTokenizerRequest(), timeout=DEADLINE_SECONDS)
    assert len(last.sha256) == 64


@pytest.mark.parametrize("name", ["SubscribeKvEvents", "FlushCache", "StartProfile", "StopProfile"])
def test_an_rpc_that_is_not_served_is_refused_by_name(stub: Any, name: str) -> None:
    read = {
        "SubscribeKvEvents": common_pb2.SubscribeKvEventsRequest,
        "FlushCache": common_pb2.FlushCacheRequest,
        "StartProfile": common_pb2.StartProfileRequest,
        "StopProfile": common_pb2.StopProfileRequest,
    }
    call: Any = getattr(stub, name)
    if name == "SubscribeKvEvents":
        error: Any = call(read[name](), timeout=DEADLINE_SECONDS)
    else:
        error = call.future(read[name](), timeout=DEADLINE_SECONDS)
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert name in error.details()


def test_a_model_that_does_not_embed_says_so(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Embed(pb.EmbedRequest(tokenized=pb.TokenizedInput(input_ids=[5])))
    error: Any = caught.value
    assert "does not embed" in error.details()
    with pytest.raises(grpc.RpcError) as caught:
        stub.Embed(pb.EmbedRequest())
    error = caught.value
    assert "tokenized.input_ids" in error.details()
