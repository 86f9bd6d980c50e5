"""Chat templates in all their places, compared with transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

import support.tokenizer_files as tokenizer_files
from runner_server.chat.format import ChatFormat
from runner_server.chat.renderer import ChatRenderer, Conversation
from runner_server.errors import RunnerFault
from runner_server.mlx_backend.tokenizer.chat_templates import read_chat_format
from runner_server.mlx_backend.tokenizer.codec import load_codec
from support.conversations import CONVERSATIONS, TOOLS, WEATHER, user
from support.tokenizer_files import write_tokenizer

CONFIG = {"model_type": "llama", "eos_token_id": [7]}
ROLES = {
    "bos_token": {"content": "<s>", "__type": "AddedToken", "special": True},
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": None,
}
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{{ pad_token }}{{ sep_token is defined }}"
)


def in_config(path: Path, template: Any) -> None:
    """Write a template into tokenizer_config.json."""
    _write_config(path, chat_template=template)


def _write_config(path: Path, **fields: Any) -> None:
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def named_in_config(path: Path) -> None:
    """Write two named templates."""
    in_config(
        path,
        [
            {"name": "default", "template": TEMPLATE},
            {"name": "tool_use", "template": f"tools: {TEMPLATE}"},
        ],
    )


def in_a_file(path: Path) -> None:
    """Write a template file with Windows line ends beside another template."""
    in_config(path, "not this one")
    (path / "chat_template.jinja").write_bytes(f"\r\n{TEMPLATE}\r\n é".encode())


def in_files(path: Path) -> None:
    """Write named templates into files."""
    in_a_file(path)
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text(f"file: {TEMPLATE}")


PLACES: dict[str, Callable[[Path], None]] = {
    "tokenizer_config.json": lambda path: in_config(path, TEMPLATE),
    "named in tokenizer_config.json": named_in_config,
    "chat_template.jinja": in_a_file,
    "additional_chat_templates": in_files,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A directory with a tokenizer, and without a template."""
    settings = ROLES | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_tokenizer(tmp_path, tokenizer_files.byte_level(), settings)
    return tmp_path


def read(path: Path, **config: Any) -> ChatFormat:
    """Read the chat format of a directory."""
    return read_chat_format(path, CONFIG | config, lambda _token: False)


@pytest.mark.parametrize("place", PLACES)
async def test_text_and_ids_are_those_of_transformers(path: Path, place: str) -> None:
    from transformers import AutoTokenizer

    PLACES[place](path)
    theirs = AutoTokenizer.from_pretrained(path)
    format_, codec = read(path), load_codec(path, CONFIG)[0]
    renderer = ChatRenderer()
    try:
        for name in ("one message", "turns", "parts", "markup"):
            for tools in TOOLS.values():
                messages = CONVERSATIONS[name]
                text = await renderer.render(format_, Conversation(messages, tools))
                options = {"tools": tools, "add_generation_prompt": True}
                assert text == theirs.apply_chat_template(messages, tokenize=False, **options)
                ids = theirs.apply_chat_template(messages, return_dict=False, **options)
                assert codec.encode(text, as_prompt=False) == ids
    finally:
        renderer.close()


def test_a_directory_without_a_template_has_none(path: Path) -> None:
    assert not read(path).has_template
    assert not read(path).problem


def test_the_file_of_a_processor_is_the_last_choice(path: Path) -> None:
    (path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 1 }}"}))
    assert read(path).templates == {"default": "{{ 1 }}"}
    in_config(path, "{{ 2 }}")
    assert read(path).templates == {"default": "{{ 2 }}"}


@pytest.mark.parametrize(
    "template", [5, [{"name": "default"}], {"default": 1}, [1]], ids=["5", "half", "map", "list"]
)
def test_a_template_of_the_wrong_type_is_a_problem(path: Path, template: Any) -> None:
    in_config(path, template)
    found = read(path)
    assert str(path) in found.problem
    assert not found.has_template


def test_an_unreadable_template_is_a_problem(path: Path) -> None:
    (path / "chat_template.jinja").write_bytes(b"\xff")
    assert "cannot be read" in read(path).problem
    (path / "chat_template.jinja").write_bytes(b"x" * (4 * 2**20 + 1))
    assert "more than 4194304 bytes" in read(path).problem


async def test_the_python_template_of_mlx_lm_is_rendered(path: Path) -> None:
    from mlx_lm.chat_templates.deepseek_v32 import apply_chat_template

    _write_config(path, chat_template_type="deepseek_v32", chat_template="not this one")
    renderer = ChatRenderer()
    try:
        conversation = Conversation([user("hé")], [WEATHER])
        text = await renderer.render(read(path), conversation)
        expected = apply_chat_template([user("hé")], add_generation_prompt=True, tools=[WEATHER])
        assert text == expected
        with pytest.raises(RunnerFault, match="Unknown role"):
            await renderer.render(read(path), Conversation([{"role": "x", "content": ""}]))
    finally:
        renderer.close()


@pytest.mark.parametrize("name", ["nobodys", "../../x", "__init__", 5])
def test_a_python_template_that_mlx_lm_lacks_is_a_problem(path: Path, name: Any) -> None:
    _write_config(path, chat_template_type=name)
    assert "mlx_lm lacks" in read(path).problem


def test_a_default_of_mlx_lm_without_a_template_is_none(path: Path) -> None:
    # mlx_lm names muse_spark for this type, which describes answers but has no template.
    assert not read(path, model_type="muse_spark").has_template
