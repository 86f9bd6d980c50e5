"""Commands on a running runner: status, trim, estimate and tokenize."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from runner_client.cli.status import memory_text, status_rows
from runner_client.testing import Failure, fake_runner
from runner_client.types import Capabilities, MemoryUsage, Model, Rank, State, Status
from support.command_line import invoke

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runner_client.testing import FakeRunner

CLOSED_PORT = "127.0.0.1:1"


@pytest.fixture
def fake() -> Iterator[FakeRunner]:
    with fake_runner() as runner:
        yield runner


def test_status_prints_rows(fake: FakeRunner) -> None:
    result = invoke("status", fake.address)
    assert result.exit_code == 0, result.output
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert rows["state"] == "active"
    assert rows["model"].startswith("fake")
    assert rows["work"].startswith("0 running, 0 queued")


def test_status_of_a_unix_socket() -> None:
    with fake_runner(listen="unix") as runner:
        result = invoke("status", runner.address)
    assert result.exit_code == 0, result.output


def test_status_as_json_is_one_object(fake: FakeRunner) -> None:
    result = invoke("status", fake.address, "--json")
    status = json.loads(result.stdout)
    assert status["state"] == "active"
    assert status["model"]["name"] == "fake"
    memory = status["memory_usage"]
    assert memory["active_bytes"] == 0
    assert {"other_bytes", "reserved_bytes", "prefix_cache_limit_bytes"} <= memory.keys()
    assert result.stderr == ""


def test_a_closed_port_is_reported() -> None:
    result = invoke("status", CLOSED_PORT)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert CLOSED_PORT in result.stderr


def test_memory_figures_are_described_in_one_line() -> None:
    memory = MemoryUsage(2**31, 2**30, 2**31, 2**32, 2**33, 2**29, 2**28, 2**34, 2**32)
    assert memory_text(memory) == (
        "active 2.0 GiB (prefix cache 512.0 MiB of 4.0 GiB), cache 1.0 GiB, peak 2.0 GiB, "
        "limit 8.0 GiB, process 4.0 GiB (outside MLX 256.0 MiB), reserved 16.0 GiB"
    )
    assert memory_text(MemoryUsage(0, 2**30, 2**31, 2**32, 0, other_bytes=2**31)) == (
        "active 0 B, cache 1.0 GiB, peak 2.0 GiB, process 4.0 GiB (outside MLX 2.0 GiB)"
    )


def test_status_rows_describe_a_busy_runner() -> None:
    memory = MemoryUsage(2**31, 2**30, 2**31, 2**32, 2**33, 2**29)
    status = Status(
        state=State.ACTIVE,
        progress=100,
        context_length=4096,
        memory_bytes=3 * 2**30,
        memory_usage=memory,
        model=Model(
            *("qwen", "/models/qwen", "qwen3", 32768, 1000, 2**31, "bfloat16", 4, (0,)),
            capabilities=Capabilities(batched=False, max_logprobs=20, max_logit_bias_count=1024),
        ),
        parallel=4,
        running_count=2,
        queued_count=1,
        step_count=12345,
        last_progress_age_seconds=0.25,
        uptime_seconds=90.4,
        runner_id="abc",
        pid=77,
        device="cpu: EPYC",
        server_version="1.2",
        last_error="it broke",
        blas="OpenBLAS (libopenblas.so.0)",
        kv_token_count=1234,
        kv_token_capacity=16384,
        prefix_cached_ratio=0.456,
        tokens_per_second=78.91,
        ranks=(Rank(0, "one", 77, "cpu: EPYC", memory), Rank(1, "two", 78, "", memory)),
    )
    assert status_rows(status) == [
        ("state", "active"),
        ("model", "qwen (qwen3, 4-bit, bfloat16, 2.0 GiB)"),
        ("context", "4,096 tokens, 4 completions together"),
        ("requests", "one after another, up to 20 log probabilities, up to 1,024 logit biases"),
        ("work", "2 running, 1 queued, 12,345 steps since the start; last progress 0.2 s ago"),
        ("KV cache", "1,234 of 16,384 tokens"),
        ("last minute", "78.9 tokens/s, 46 % of prompt tokens from the prefix cache"),
        (
            "memory",
            memory_text(memory),
        ),
        ("device", "cpu: EPYC"),
        ("BLAS", "OpenBLAS (libopenblas.so.0)"),
        ("runner", "process 77, version 1.2, up 90 s"),
        ("rank 0", f"process 77 on one (cpu: EPYC), {memory_text(memory)}"),
        ("rank 1", f"process 78 on two, {memory_text(memory)}"),
        ("last error", "it broke"),
    ]


def test_trim_prints_the_freed_bytes(fake: FakeRunner) -> None:
    fake.prefix_cache_bytes = 3 * 2**20
    result = invoke("trim", fake.address, "--prefix-cache", "2MiB")
    assert (result.exit_code, result.stdout) == (0, "1.0 MiB freed\n")
    assert json.loads(invoke("trim", fake.address, "--json").stdout) == {"freed_bytes": 2**21}
    asked = [request.HasField("prefix_cache_bytes") for request in fake.requests]
    assert asked == [True, False]


def test_estimate_asks_a_running_runner(fake: FakeRunner) -> None:
    result = invoke("estimate", "org/name", "--address", fake.address, "--context-length", "64")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "model           org/name",
        "held            as float32",
        "context         64 tokens, 4 completions together",
        "weights            1.0 GiB",
        "KV cache               0 B",
        "prefix cache           0 B",
        "working memory         0 B",
        "process                0 B",
        "load transient         0 B",
        "needed             1.0 GiB",
        "kept free              0 B",
        "reserved               0 B  that other runners may still take",
        "available          1.0 TiB",
        "fits            yes, 1023.0 GiB to spare",
    ]


def test_estimate_exits_with_3_if_the_runner_lacks_memory(fake: FakeRunner) -> None:
    fake.available_bytes = 2**29
    arguments = ("estimate", "org/name", "--address", fake.address)
    result = invoke(*arguments)
    assert result.exit_code == 3
    assert "no, 512.0 MiB short" in result.stdout
    as_json = invoke(*arguments, "--json")
    assert as_json.exit_code == 3
    report = json.loads(as_json.stdout)
    assert (report["fits"], report["estimate"]["fits"]) == (False, False)
    assert report["estimate"]["required_bytes"] == 2**30
    stored = invoke(*arguments, "--dtype", "auto_or_stored")
    assert stored.exit_code == 0
    assert "held            as stored" in stored.stdout
    assert "note            it would be held as stored" in stored.stdout


def test_tokenize_and_detokenize_are_inverses(fake: FakeRunner) -> None:
    ids = invoke("tokenize", "--address", fake.address, "héllo")
    assert ids.stdout == "104 233 108 108 111\n"
    back = invoke("tokenize", "--address", fake.address, "--detokenize", "104, 233,108 108 111")
    assert back.stdout == "héllo\n"


def test_tokenize_takes_the_address_as_first_argument_or_as_an_option(fake: FakeRunner) -> None:
    assert invoke("tokenize", fake.address, "hi").stdout == "104 105\n"
    assert invoke("tokenize", fake.address, "-", given="hi").stdout == "104 105\n"
    assert invoke("tokenize", "--address", fake.address, "hi").stdout == "104 105\n"


def test_tokenize_reads_standard_input(fake: FakeRunner) -> None:
    result = invoke("tokenize", "--address", fake.address, "-", given="a\n")
    assert result.stdout == "97 10\n"


def test_standard_input_must_be_utf8(fake: FakeRunner) -> None:
    result = invoke("tokenize", "--address", fake.address, "-", given=b"a\xff")
    assert result.exit_code == 2
    assert "not UTF-8: invalid start byte at byte 1" in result.stderr


@pytest.mark.parametrize("arguments", [["hi"], ["--detokenize", "104 105"]])
def test_tokenize_as_json_has_text_and_ids(fake: FakeRunner, arguments: list[str]) -> None:
    result = invoke("tokenize", "--address", fake.address, "--json", *arguments)
    assert json.loads(result.stdout) == {"content": "hi", "token_ids": [104, 105]}


def test_special_tokens_are_added_on_request(fake: FakeRunner) -> None:
    invoke("tokenize", "--address", fake.address, "--add-special-tokens", "a")
    invoke("tokenize", "--address", fake.address, "a")
    assert [request.add_special_tokens for request in fake.requests] == [True, False]  # type: ignore[attr-defined]  # a list of messages of all kinds


def test_a_refusal_by_the_runner_is_reported(fake: FakeRunner) -> None:
    fake.failure = Failure("MODEL_NOT_LOADED", "no model is loaded; call Load first")
    result = invoke("tokenize", "--address", fake.address, "--json", "a")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(
        "error: no model is loaded; load one with `mlx-runner load ADDRESS MODEL`"
    )


def test_a_number_of_thousands_of_digits_is_not_a_token_id() -> None:
    with fake_runner() as runner:
        result = invoke("tokenize", "--detokenize", "--address", runner.address, "9" * 5000)
    assert result.exit_code == 2
    assert "is not a token id" in result.stderr
