"""The lean import of mlx_lm: heavy dependencies stay out, and stay available on demand."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

Build = Callable[..., Path]
ROOT = Path(__file__).parents[2]


def _python(code: str, *args: str) -> str:
    """Run code in a fresh interpreter and return the output."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_LOAD = """
import os, sys
from runner_server.mlx_backend import MlxBackend
from runner_server.engine.types import LoadSpec
backend = MlxBackend()
backend.open()
model = backend.load(LoadSpec(sys.argv[1]), lambda progress: None)
assert model.codec.decode(model.codec.encode("hello", as_prompt=True)) == "hello"
heavy = {"transformers", "huggingface_hub", "numpy", "mlx_lm.generate", "mlx_lm.tokenizer_utils"}
print(sorted(heavy & set(sys.modules)), flush=True)
os._exit(0)
"""

KINDS = [
    {"shape": "llama"},
    {"shape": "qwen3"},
    {"shape": "gemma3"},
    {"quantize_bits": 4, "dtype": "bfloat16"},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_model_is_loaded_without_heavy_imports(model_dir: Build, kind: dict[str, object]) -> None:
    assert _python(_LOAD, str(model_dir(**kind))) == "[]\n"


_AFTERWARDS = """
import sys
from runner_server.mlx_backend.upstream import names
import mlx_lm.utils
assert "transformers" not in sys.modules
import huggingface_hub, mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper
assert huggingface_hub.snapshot_download.__module__.startswith("huggingface_hub")
assert mlx_lm.__version__ and callable(mlx_lm.generate)
assert mlx_lm.utils is sys.modules[names.load_model.__module__]
model, tokenizer = mlx_lm.load(sys.argv[1])
assert isinstance(tokenizer, TokenizerWrapper)
print(mlx_lm.generate(model, tokenizer, "hello", max_tokens=3) is not None)
"""


def test_the_rest_of_mlx_lm_remains_importable(model_dir: Build) -> None:
    assert _python(_AFTERWARDS, str(model_dir())) == "True\n"


_BEFORE = """
import mlx_lm
from runner_server.mlx_backend.upstream import names
print(names.load_model is mlx_lm.utils.load_model)
"""


def test_mlx_lm_may_be_imported_first() -> None:
    assert _python(_BEFORE) == "True\n"


_OTHER_RELEASE = """
import sys
from types import ModuleType
from runner_server.mlx_backend.upstream import lean_import
lean_import._tokenizers_shell = lambda: ModuleType("mlx_lm.tokenizer_utils")
from runner_server.mlx_backend.upstream import names
import mlx_lm
print("transformers" in sys.modules, names.load_model is mlx_lm.utils.load_model)
"""


def test_a_release_that_needs_other_names_is_imported_whole() -> None:
    assert _python(_OTHER_RELEASE) == "True True\n"


def test_a_missing_module_raises_an_import_error() -> None:
    code = """
from runner_server.mlx_backend.upstream.lean_import import import_lean
try:
    import_lean("mlx_lm.no_such_module")
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert _python(code) == "mlx_lm.no_such_module\n"


def test_mlx_lm_uses_the_deferred_names_as_assumed() -> None:
    """A shell suffices because the class occurs in annotations only, the functions in calls."""
    spec = importlib.util.find_spec("mlx_lm")
    assert spec
    assert spec.origin
    tree = ast.parse((Path(spec.origin).parent / "utils.py").read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    hints = {
        id(name)
        for function in functions
        for hint in [
            function.returns,
            *(arg.annotation for arg in ast.walk(function.args) if isinstance(arg, ast.arg)),
        ]
        if hint
        for name in ast.walk(hint)
    }
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    classes = [node for node in used if node.id == "TokenizerWrapper"]
    calls = [node for node in used if node.id in {"_load_tokenizer", "snapshot_download"}]
    assert classes
    assert calls
    assert all(id(node) in hints for node in classes)
    assert all(id(node) in called for node in calls)
