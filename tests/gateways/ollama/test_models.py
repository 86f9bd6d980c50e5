"""Models of a pool by Ollama's interface: lists, keep-alive, pins, rights and disconnections."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest

from gateways.ollama.conftest import POOL, Served
from support.http_child import DEMO, http_child

pytestmark = [pytest.mark.mlx, pytest.mark.slow]

_DEADLINE_SECONDS = 60.0
_ALL, _USE = "token-with-all-rights", "token-for-use-only"


@pytest.fixture
def client(pool: Served) -> Iterator[ollama.Client]:
    with ollama.Client(pool.url) as made:
        yield made


@pytest.fixture
def demo(client: ollama.Client, pool: Served) -> Iterator[str]:
    """Name of the demo model, which is loaded and, in the end, no longer pinned."""
    name = pool.models["DEMO"]
    client.generate(name)
    yield name
    client.generate(name, keep_alive="5m")


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + _DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def running(client: ollama.Client) -> dict[str | None, ollama.ProcessResponse.Model]:
    return {each.model: each for each in client.ps().models}


def remaining(model: ollama.ProcessResponse.Model) -> float:
    """Return the time for which a model stays, in seconds."""
    assert model.expires_at
    return model.expires_at.timestamp() - time.time()


def test_models_are_listed_with_their_files(client: ollama.Client, pool: Served) -> None:
    found = {each.model: each for each in client.list().models}
    assert set(found) == set(pool.models.values())
    model = found[pool.models["DEMO"]]
    assert model.size == sum(each.stat().st_size for each in DEMO.iterdir())
    assert model.details
    assert (model.details.format, model.details.family) == ("safetensors", "llama")
    assert model.details.parameter_size == "2.0M"
    assert model.details.quantization_level == "F16"
    assert len(model.digest or "") == 64
    assert model.modified_at


def test_a_model_is_described_loaded_or_not(client: ollama.Client, pool: Served) -> None:
    name = pool.models["SCRIPTED"]
    for keep_alive in (0, "5m"):
        client.generate(name, keep_alive=keep_alive)
        shown = client.show(name)
        assert shown.capabilities == ["completion", "tools", "thinking", "embedding"]
        assert shown.modelinfo
        assert shown.modelinfo["llama.context_length"] == 1024
        assert shown.modelinfo["llama.embedding_length"] == 320
        assert "tool.function.name" in (shown.template or "")


def test_a_model_stays_for_its_keep_alive(client: ollama.Client, demo: str) -> None:
    client.generate(demo, keep_alive="10m")
    model = running(client)[demo]
    assert 500 < remaining(model) <= 600
    assert model.context_length == 1024
    assert model.size
    assert model.size_vram == 0
    # Without one, the last one holds.
    client.generate(demo, "Hello!", options={"num_predict": 1})
    assert 500 < remaining(running(client)[demo]) <= 600
    client.generate(demo, keep_alive=0.05)
    eventually(lambda: demo not in running(client))


def test_zero_unloads_at_once_or_after_the_answer(client: ollama.Client, demo: str) -> None:
    assert client.generate(demo, keep_alive=0).done_reason == "unload"
    assert demo not in running(client)
    answer = client.chat(demo, [{"role": "user", "content": "Hello!"}], keep_alive=0)
    assert answer.message.content
    assert answer.load_duration
    eventually(lambda: demo not in running(client))
    # An unload of an absent model succeeds.
    assert client.generate(demo, keep_alive=0).done_reason == "unload"


def test_zero_waits_for_the_streams_of_others(client: ollama.Client, demo: str) -> None:
    stream = client.generate(demo, "import", raw=True, stream=True, options={"num_predict": 200})
    first = next(stream)
    assert client.generate(demo, keep_alive=0).done_reason == "unload"
    assert [first, *stream][-1].done
    eventually(lambda: demo not in running(client))


def test_requests_that_unload_do_not_fail_each_other(client: ollama.Client, pool: Served) -> None:
    def ask(number: int) -> str | None:
        messages = [{"role": "user", "content": str(number)}]
        name, options = pool.models["SCRIPTED"], {"num_ctx": 64}
        answer = client.chat(name, messages, think=False, keep_alive=0, options=options)
        return answer.message.content

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(ask, range(8))) == {"Two, 日本."}


def test_less_than_zero_pins(client: ollama.Client, demo: str) -> None:
    client.generate(demo, keep_alive=-1)
    assert remaining(running(client)[demo]) > 10**9
    client.generate(demo, keep_alive="5m")
    assert remaining(running(client)[demo]) <= 300


def test_vectors_unload_their_model_after_the_last_one(client: ollama.Client, pool: Served) -> None:
    name = pool.models["SCRIPTED"]
    found = client.embed(name, ["Two"] * 65, keep_alive=0)
    assert len(found.embeddings) == 65
    eventually(lambda: name not in running(client))


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("name", ["pool", "server"])
def test_a_client_that_goes_away_ends_its_request(
    request: pytest.FixtureRequest, name: str, *, is_stream: bool
) -> None:
    served: Served = request.getfixturevalue(name)
    long = {"type": "array", "items": {"type": "integer"}, "minItems": 450}
    body = {"model": served.models["DEMO"], "prompt": "Hi", "format": long, "stream": is_stream}
    data = json.dumps(body).encode()
    url = httpx.URL(served.url)
    ended = cancelled_count(served)
    with served.runner() as status:
        with socket.create_connection((url.host, url.port or 0)) as sock:
            head = f"POST /api/generate HTTP/1.1\r\nhost: {url.host}\r\n"
            sock.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
            eventually(lambda: status().running_count == 1)
        eventually(lambda: status().running_count == 0)
    eventually(lambda: cancelled_count(served) == ended + 1)


def cancelled_count(served: Served) -> int:
    """Return how many requests the runner has seen cancelled."""
    return len(re.findall(r" (Chat|Completion) .*CANCELLED", served.child.log.read_text()))


def test_a_function_of_python_is_a_tool(client: ollama.Client, pool: Served) -> None:
    def get_weather(place: str, days: int = 1) -> str:
        """Get the weather.

        Args:
            place: Where.
            days: How many days.
        """
        return f"{place} {days}"

    messages = [ollama.Message(role="user", content="Weather?")]
    answer = client.chat(pool.models["SCRIPTED"], messages, tools=[get_weather])
    (call,) = answer.message.tool_calls or ()
    result = get_weather(**call.function.arguments)
    assert result == "Zürich 2"
    messages += [answer.message, ollama.Message(role="tool", content=result, tool_name="f")]
    assert client.chat(pool.models["SCRIPTED"], messages).message.content == "It rains in Zürich."


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a pool with both tokens; yield its URL."""
    folder = tmp_path_factory.mktemp("guarded")
    files = [folder / name for name in (_ALL, _USE)]
    for file in files:
        file.write_text(file.name)
        file.chmod(0o600)
    options = ("--token-file", str(files[0]), "--use-token-file", str(files[1]))
    with http_child(folder, [*POOL, *options]) as child:
        yield child.url


def test_the_token_for_use_neither_unloads_nor_pins(guarded: str) -> None:
    def ask(token: str, path: str = "/api/generate", **body: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        body = {"model": str(DEMO), **body}
        return httpx.post(f"{guarded}{path}", json=body, headers=headers, timeout=60)

    assert ask("").status_code == 401
    assert ask("wrong").status_code == 401
    assert httpx.get(guarded).text == "Ollama is running"
    assert ask(_USE, keep_alive="1m").json()["done_reason"] == "load"
    for keep_alive in (0, -1):
        refused = ask(_USE, keep_alive=keep_alive)
        assert refused.status_code == 403
        assert "keep_alive" in refused.json()["error"]
        assert ask(_ALL, keep_alive=keep_alive).status_code == 200


def test_a_server_keeps_its_model(server: Served) -> None:
    name = server.models["DEMO"]
    with ollama.Client(server.url) as client:
        with pytest.raises(ollama.ResponseError, match="keep_alive: 0 unloads") as error:
            client.generate(name, keep_alive=0)
        assert error.value.status_code == 400
        assert client.generate(name, keep_alive=-1).done_reason == "load"
        assert remaining(running(client)[str(Path(name).name)]) > 10**9
        (listed,) = client.list().models
        assert listed.model == Path(name).name
        assert json.loads(client.show(listed.model or "").model_dump_json())["capabilities"]
