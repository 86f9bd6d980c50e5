"""The public names, pinned against accidental removal."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import runner_client
import runner_server
from runner_client import errors, settings, types

ROOT = Path(__file__).parents[2]

PUBLIC = [
    "AsyncChatStream",
    "AsyncCompletionStream",
    "AsyncPendingLoad",
    "AsyncRunnerClient",
    "AsyncRunnerPool",
    "AsyncRunnerProcess",
    "AsyncStatusStream",
    "AuthenticationError",
    "BusyError",
    "Capabilities",
    "ChatChunk",
    "ChatCompletion",
    "ChatMessage",
    "ChatStream",
    "Choice",
    "Completion",
    "CompletionChunk",
    "CompletionStream",
    "DeviceInfo",
    "DoneReason",
    "DraftModel",
    "DrainResult",
    "Embedding",
    "GateDecision",
    "GenerationFailedError",
    "IncompleteStreamError",
    "InsufficientMemoryError",
    "InvalidRequestError",
    "JsonObject",
    "JsonSchema",
    "LarkGrammar",
    "LoadEstimate",
    "LoadKeywords",
    "LoadOptions",
    "LoadRequiresFullError",
    "LoadResult",
    "MemoryEstimate",
    "MemoryGate",
    "MemoryReturn",
    "MemoryUsage",
    "Model",
    "ModelError",
    "ModelNotFoundError",
    "ModelNotLoadedError",
    "ModelSettings",
    "ModelState",
    "ModelUnsupportedError",
    "NotSupportedError",
    "Options",
    "PendingLoad",
    "PermissionDeniedError",
    "PoolModel",
    "PoolSettings",
    "PoolStatus",
    "PromptProgress",
    "PromptTooLongError",
    "QueueFullError",
    "Rank",
    "Regex",
    "RenderedChat",
    "RequestAbortedError",
    "RestartPolicy",
    "RunnerClient",
    "RunnerError",
    "RunnerExitedError",
    "RunnerPool",
    "RunnerProcess",
    "RunnerTimeoutError",
    "RunnerUnavailableError",
    "ShuttingDownError",
    "State",
    "Status",
    "StatusStream",
    "Timeouts",
    "TlsFiles",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "TopLogprob",
    "UnsupportedPlatformError",
]

WITHOUT_MLX = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"mlx", "mlx_lm", "runner_server", "transformers", "numpy",
                                  "huggingface_hub", "grpc_health", "grpc_status", "pydantic"}:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Block())

import asyncio, importlib, pkgutil
import runner_client

for module in pkgutil.walk_packages(runner_client.__path__, "runner_client."):
    # A pool's server has the dependencies of a server, and pull those of its own extra.
    if not module.name.startswith(("runner_client.pool.serving.", "runner_client.pull.")):
        importlib.import_module(module.name)

from runner_client import AsyncRunnerClient, RunnerClient
from runner_client.testing import fake_runner

async def ask(address):
    async with AsyncRunnerClient(address) as client:
        return (await client.complete("Hi")).content

with fake_runner() as runner:
    with RunnerClient(runner.address) as client:
        assert client.complete("Hi").content == "Hello world"
        assert client.is_serving()
    assert asyncio.run(ask(runner.address)) == "Hello world"
print("talked")
"""


def test_the_public_names_are_pinned() -> None:
    assert runner_client.__all__ == PUBLIC
    assert all(hasattr(runner_client, name) for name in PUBLIC)


def test_every_error_and_every_result_is_public() -> None:
    for module in (errors, settings, types):
        for name, member in vars(module).items():
            if inspect.isclass(member) and member.__module__.startswith(module.__name__):
                assert name in PUBLIC


def test_no_class_overrides_privates_of_another_module() -> None:
    for info in pkgutil.walk_packages(runner_client.__path__, "runner_client."):
        module = importlib.import_module(info.name)
        for owner in vars(module).values():
            if not inspect.isclass(owner) or owner.__module__ != module.__name__:
                continue
            private = {name for name in vars(owner) if name[0] == "_" and name[:2] != "__"}
            for base in owner.__mro__[1:]:
                if base.__module__.startswith("runner_") and base.__module__ != module.__name__:
                    assert not private & vars(base).keys(), f"{owner} overrides those of {base}"


def test_client_and_server_repeat_the_version_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert runner_client.__version__ == runner_server.__version__ == project["version"]


def test_the_client_works_without_mlx_and_without_the_server() -> None:
    path = f"{ROOT}:{ROOT / 'proto'}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_MLX],
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "talked\n", done.stderr


def test_no_module_imports_the_server_or_mlx() -> None:
    for file in (ROOT / "runner_client").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            tops = {name.split(".")[0] for name in names}
            assert not tops & {"mlx", "mlx_lm", "runner_server"}, f"{file}: {names}"


def _parameters(owner: type) -> dict[str, dict[str, inspect.Parameter]]:
    """Return the parameters of the public methods of a class, by method name."""
    return {
        name: dict(inspect.signature(member).parameters)
        for name, member in inspect.getmembers(owner, inspect.isfunction)
        if not name.startswith("_")
    }


def test_sync_and_asyncio_have_the_same_signatures() -> None:
    assert _parameters(runner_client.RunnerClient) == _parameters(runner_client.AsyncRunnerClient)
    assert _parameters(runner_client.RunnerProcess) == _parameters(runner_client.AsyncRunnerProcess)


def test_the_public_modules_keep_their_names() -> None:
    for module, name in (("estimate", "estimate"), ("gate", "MemoryGate")):
        assert getattr(importlib.import_module(f"runner_client.{module}"), name)
