"""Malicious model directories: no code runs, no load hangs, the process survives.

`test_broken_models` covers directories that are merely broken, and the first canaries.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.engine.backend import LoadedModel
from runner_server.errors import ModelUnsupported, RunnerFault
from runner_server.mlx_backend import MlxBackend
from support.harness import Server, failure, running
from support.tokenizer_files import leave_to_transformers

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

Build = Callable[..., Path]
Load = Callable[..., LoadedModel]
Change = Callable[[Path], object]

QUICK_SECONDS = 60.0
"""Time limit for a load; importing transformers alone takes many seconds on a busy machine."""


@pytest.fixture
def copy(model_dir: Build, tmp_path: Path) -> Path:
    """A copy of a sound model for each test."""
    return Path(shutil.copytree(model_dir(), tmp_path / "model"))


@pytest.fixture
async def real(socket_dir: Path) -> AsyncIterator[Server]:
    """A server with MLX on the engine thread."""
    backend: Any = MlxBackend()
    async with running(socket_dir, backend) as (app, channel, ready):
        yield Server(app, backend, channel, ready)


def _edit(path: Path, **changes: object) -> None:
    file = json.loads(path.read_text())
    path.write_text(json.dumps(file | changes))


def _fault(load: Load, path: Path) -> RunnerFault | None:
    began = time.monotonic()
    try:
        load(path)
    except RunnerFault as fault:
        return fault.with_traceback(None)
    finally:
        assert time.monotonic() - began < QUICK_SECONDS
    return None


# -- code ------------------------------------------------------------------------

CANARY = """
from pathlib import Path
Path(__file__).with_name("RAN").write_text("ran")
raise SystemExit("the model's own code ran")
"""


class Pickled:
    """Object which runs code when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        """See ``object.__reduce__``."""
        return Path.write_text, (self.path / "RAN", "ran")


def _pickle(path: Path, name: str) -> None:
    (path / name).write_bytes(pickle.dumps(Pickled(path)))


def _only_pickle(path: Path) -> None:
    (path / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "weights.npz", "tokenizer.pkl"):
        _pickle(path, name)


def _tokenizer(**settings: object) -> Change:
    return lambda path: _edit(path / "tokenizer_config.json", **settings)


def _config(**settings: object) -> Change:
    return lambda path: _edit(path / "config.json", **settings)


CODE: dict[str, Change] = {
    "model_file": _config(model_file="canary.py"),
    "model_file as a path": _config(model_file="./sub/../canary.py"),
    "model_file as a list": _config(model_file=["canary.py"]),
    "model_file that is empty": _config(model_file=""),
    "model_type as a module": _config(model_type="..canary"),
    "model of a class of its own": _config(
        auto_map={"AutoModelForCausalLM": "canary.Model", "AutoConfig": "canary.Config"},
        architectures=["canary.Model"],
        trust_remote_code=True,
    ),
    "tokenizer class": _tokenizer(
        tokenizer_class="canary.CanaryTokenizer",
        auto_map={"AutoTokenizer": ["canary.CanaryTokenizer", None]},
        trust_remote_code=True,
    ),
    "tokenizer class of a repository": _tokenizer(
        tokenizer_class="CanaryTokenizer",
        auto_map={"AutoTokenizer": ["org/name--canary.CanaryTokenizer", None]},
    ),
    "chat template module": _tokenizer(chat_template_type="canary"),
    "chat template module elsewhere": _tokenizer(chat_template_type="..canary"),
    "tool parser module": _tokenizer(tool_parser_type="canary"),
    "tool parser module elsewhere": _tokenizer(tool_parser_type="..sys"),
    "pickled weights only": _only_pickle,
    "pickle named as weights": lambda path: _pickle(path, "model.safetensors"),
    "pickle named as tokenizer": lambda path: _pickle(path, "tokenizer.json"),
}
HARMLESS = {
    "model of a class of its own",
    "tokenizer class",
    "tokenizer class of a repository",
    "chat template module",
    "chat template module elsewhere",
    "tool parser module",
    "tool parser module elsewhere",
}
"""Cases which load: the runner ignores the request for code, and the model is a known one."""


@pytest.mark.parametrize("case", CODE)
def test_code_in_a_model_directory_never_runs(
    load: Load, copy: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    (copy / "canary.py").write_text(CANARY)
    # An import would find it, as in a server started in that directory.
    monkeypatch.syspath_prepend(str(copy))
    CODE[case](copy)
    fault = _fault(load, copy)
    assert not (copy / "RAN").exists()
    assert isinstance(fault, ModelUnsupported) or (fault is None and case in HARMLESS), repr(fault)


# -- files -----------------------------------------------------------------------


def test_links_that_leave_the_directory_are_followed(
    load: Load, model_dir: Build, tmp_path: Path
) -> None:
    """The Hugging Face cache consists of such links; only `--model-root` forbids them."""
    model = tmp_path / "snapshot"
    model.mkdir()
    for file in model_dir().iterdir():
        (model / file.name).symlink_to(file)
    assert _fault(load, model) is None
    whole = tmp_path / "link"
    whole.symlink_to(model, target_is_directory=True)
    assert load(whole).info.path == str(model)


def _link(target: str) -> Callable[[Path], None]:
    return lambda file: file.symlink_to(target)


def _sparse(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(1 << 40)


ODD_FILES: dict[str, Callable[[Path], object]] = {
    "endless": _link("/dev/zero"),
    "a pipe": os.mkfifo,
    "a terminal": _link("/dev/tty"),
    "a ring": lambda file: file.symlink_to(file.name),
    "a directory": Path.mkdir,
    "nothing": _link("/nowhere/at/all"),
    "a terabyte of zeros": _sparse,
}
MISSING = {"a ring", "a directory", "nothing"}
"""Kinds treated as a missing file; a tokenizer does not need settings."""

READ_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]


@pytest.mark.parametrize("name", READ_FILES)
@pytest.mark.parametrize("kind", ODD_FILES)
def test_special_files_are_refused(load: Load, copy: Path, name: str, kind: str) -> None:
    """Reading such files would never end, or exhaust memory."""
    (copy / name).unlink()
    ODD_FILES[kind](copy / name)
    fault = _fault(load, copy)
    if name == "tokenizer_config.json" and kind in MISSING:
        assert fault is None, repr(fault)
        return
    assert isinstance(fault, ModelUnsupported), repr(fault)
    assert name.partition(".")[0].partition("_")[0] in str(fault)


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "merges.txt"])
def test_special_files_among_optional_files_are_refused(load: Load, copy: Path, name: str) -> None:
    os.mkfifo(copy / name)
    fault = _fault(load, copy)
    assert isinstance(fault, ModelUnsupported)
    assert name in str(fault)


def test_a_special_file_among_the_chat_templates_is_refused(load: Load, copy: Path) -> None:
    folder = copy / "additional_chat_templates"
    folder.mkdir()
    os.mkfifo(folder / "tool.jinja")
    fault = _fault(load, copy)
    assert isinstance(fault, ModelUnsupported)
    assert "tool.jinja" in str(fault)


# -- chat templates --------------------------------------------------------------

TEMPLATES = {
    "reaches for internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "opens a file": "{{ cycler.__init__.__globals__.os.system('touch RAN') }}",
    "loops": "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}",
    "grows": "{{ 'x' * 10**12 }}",
    "is no template": "{% for %}{{ {% }} <think> <tool_call>",
    "calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a template is compiled in this process."""
    jinja2 = pytest.importorskip("jinja2", reason="jinja2 is not installed")
    for name in ("compile", "from_string", "parse"):
        monkeypatch.setattr(jinja2.Environment, name, _forbidden)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("case", TEMPLATES)
def test_chat_templates_are_never_compiled(load: Load, copy: Path, case: str) -> None:
    _edit(copy / "tokenizer_config.json", chat_template=TEMPLATES[case])
    (copy / "chat_template.jinja").write_text(TEMPLATES[case])
    _assert_texts_survive(load(copy))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("case", ["loops", "is no template"])
def test_chat_templates_are_never_compiled_with_transformers(
    load: Load, copy: Path, case: str
) -> None:
    """A start of transformers takes a second, so all templates come at once, under names."""
    named = [{"name": name, "template": text} for name, text in TEMPLATES.items()]
    _edit(copy / "tokenizer_config.json", chat_template=named)
    (copy / "chat_template.jinja").write_text(TEMPLATES[case])
    (copy / "additional_chat_templates").mkdir()
    for name, text in TEMPLATES.items():
        (copy / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    leave_to_transformers(copy)
    _assert_texts_survive(load(copy))


def _assert_texts_survive(model: LoadedModel) -> None:
    ids = model.codec.encode("<|user|>hello", as_prompt=True)
    assert model.codec.decode(ids) == "<|user|>hello"


def _forbidden(*_args: object, **_kwargs: object) -> None:
    raise AssertionError("a chat template was compiled")


# -- tokenizers ------------------------------------------------------------------

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _split_by(regex: str) -> dict[str, Any]:
    split = {
        "type": "Split",
        "pattern": {"Regex": regex},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, BYTES]}}


REFUSED: dict[str, dict[str, Any]] = {
    "normalizer panics while it is read": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "////AAAA"}
    },
    "normalizer panics in use": {
        "normalizer": {
            "type": "Precompiled",
            "precompiled_charsmap": "EAAAAP////////////////////8=",
        }
    },
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "decoder panics": {"decoder": {"type": "Strip", "content": "a", "start": 5, "stop": 5}},
    "regex with a thousand groups": _split_by("(" * 5000 + "a" + ")" * 5000),
    "regex that is none": _split_by("("),
    "vocabulary without what stands for the unknown": {
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "missing"}
    },
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_failing_tokenizer_is_refused_and_the_process_survives(
    real: Server, copy: Path, model_dir: Build, case: str
) -> None:
    """A Rust panic is not an ``Exception`` in Python: uncaught, one would end the engine thread."""
    _edit(copy / "tokenizer.json", **REFUSED[case])
    problem = await failure(real.load(str(copy)))
    assert problem.reason == "MODEL_UNSUPPORTED"
    assert "tokenizer" in problem.message
    await real.load(str(model_dir()))
    assert await real.text(num_predict=3, temperature=0, logit_bias={0: -100})


@pytest.mark.parametrize("regex", ["(a+)+$", "(a|aa)+$", "(x+x+)+y"])
async def test_a_regex_with_exponential_time_gives_up(real: Server, copy: Path, regex: str) -> None:
    """Oniguruma limits retries and then panics, which must become an ordinary error."""
    _edit(copy / "tokenizer.json", **_split_by(regex))
    await real.load(str(copy))
    text = "a" * 60 + "!" + "x" * 60
    began = time.monotonic()
    calls: list[Any] = [
        real.start(text, num_predict=2),
        real.stub.Tokenize(pb.TokenizeRequest(content=text)),
    ]
    for call in calls:
        assert (await failure(call)).reason == "GENERATION_FAILED"
    assert time.monotonic() - began < QUICK_SECONDS
    assert await real.text("b", num_predict=3, temperature=0, logit_bias={0: -100})


async def test_a_tokenizer_with_out_of_range_ids_is_refused(real: Server, copy: Path) -> None:
    """A template may put any number before a text, even one outside the protocol's id range."""
    special = {"id": "A", "ids": [2**32 - 1], "tokens": ["<eos>"]}
    single = [{"SpecialToken": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": {"A": special},
    }
    _edit(copy / "tokenizer.json", post_processor=template)
    problem = await failure(real.load(str(copy)))
    assert problem.reason == "MODEL_UNSUPPORTED"
