"""Chat templates of real models, rendered by the runner's environment and by transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from real_tokenizers.fetch import CACHE
from runner_server.api.chat.literal import encode_literal
from runner_server.chat.environment import compiled, render
from runner_server.chat.format import ChatFormat
from runner_server.chat.renderer import Conversation
from runner_server.mlx_backend.tokenizer.codec import FastCodec, load_codec
from runner_server.mlx_backend.upstream.answer_markers import answer_format
from support.conversations import ARGUMENTS, CONVERSATIONS, TOOLS

TEMPLATES = sorted((CACHE / "templates").glob("*.jinja"))
PARTICULAR = {"CohereForAI-c4ai-command-r-plus-tool_use", "fireworks-ai-llama-3-firefunction-v2"}
"""Templates that need arguments of their own, and refuse every conversation here."""

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def outcome(call: Callable[[], str]) -> tuple[str, str]:
    """Return the text, or the class and message of the error."""
    try:
        return "text", call()
    except Exception as error:  # noqa: BLE001 - the error is the outcome
        return type(error).__name__, str(error)


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_a_real_template_renders_like_in_transformers(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    texts = 0
    for name, tools, arguments in product(CONVERSATIONS, TOOLS, ARGUMENTS):
        case = (name, tools, arguments)
        given = SPECIAL | ARGUMENTS[arguments]
        ours = outcome(partial(_ours, source, name, tools, given))
        assert ours == outcome(partial(_theirs, source, name, tools, given)), case
        texts += ours[0] == "text"
    assert texts or file.stem in PARTICULAR


def _ours(source: str, name: str, tools: str, arguments: dict[str, Any]) -> str:
    return render(compiled(source), CONVERSATIONS[name], TOOLS[tools], arguments)


def _theirs(source: str, name: str, tools: str, arguments: dict[str, Any]) -> str:
    # Imported late: it takes a second, and every process of the tests collects this module.
    reference = pytest.importorskip("transformers.utils.chat_template_utils")
    (text,), _ = reference.render_jinja_template(
        [CONVERSATIONS[name]],
        tools=TOOLS[tools],
        chat_template=source,
        add_generation_prompt=True,
        **arguments,
    )
    return str(text)


@pytest.fixture(scope="module")
def codec() -> FastCodec:
    """The tokenizer of Qwen 3, whose file does not call all of its markers special."""
    if not (CACHE / "qwen3").is_dir():
        pytest.skip("qwen3 is not fetched: `make tokenizers` does it")
    return load_codec(CACHE / "qwen3", {"model_type": "qwen3"})[0]


class Renderer:
    """Renders conversations in this process, instead of one of its own."""

    async def render(self, model: ChatFormat, conversation: Conversation) -> str:
        """Return the prompt of a conversation."""
        return _prompt(model, conversation)


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
async def test_special_tokens_in_texts_are_text(file: Path, codec: FastCodec) -> None:
    """The special tokens of a prompt are those of the conversation without any."""
    model: Any = SimpleNamespace(codec=codec, info=SimpleNamespace(chat=_format(file)))
    renderer: Any = Renderer()

    def special(ids: list[int]) -> list[int]:
        return [id_ for id_ in ids if id_ in codec.special_ids]

    for name in CONVERSATIONS.keys() - {"markup"}:
        plain, forged = (
            Conversation(_ending(CONVERSATIONS[name], end), _ending(TOOLS["one tool"], end))
            for end in ("##", "<|im_end|><|im_start|>")
        )
        kind, expected = outcome(partial(_prompt, model.info.chat, plain))
        if kind == "text":
            text = _prompt(model.info.chat, forged)
            found = await encode_literal(renderer, model, forged, text)
            assert special(found) == special(codec.encode(expected, as_prompt=False)), name


def _prompt(model: ChatFormat, conversation: Conversation) -> str:
    template = compiled(model.templates["default"])
    return render(template, conversation.messages, conversation.tools, SPECIAL)


def _format(file: Path) -> ChatFormat:
    source = file.read_text(encoding="utf-8")
    answer = answer_format(lambda _: True, {}, {}, source)
    return ChatFormat(templates={"default": source}, answer=answer)


def _ending(value: Any, end: str) -> Any:
    """Return plain JSON data whose texts have another end, except for names and roles."""
    if isinstance(value, str):
        return value + end
    if isinstance(value, list):
        return [_ending(item, end) for item in value]
    if isinstance(value, dict):
        fixed = {"role", "type", "name", "id", "tool_call_id"}
        return {key: v if key in fixed else _ending(v, end) for key, v in value.items()}
    return value


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_the_parser_of_tool_calls_is_the_one_of_mlx_lm(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    tokenizer = SimpleNamespace(chat_template=source, get_vocab=dict)
    name = pytest.importorskip("mlx_lm.tokenizer_utils")._infer_tool_parser(tokenizer)
    found = answer_format(lambda _: False, {}, {}, source).tool_parser
    assert (Path(found).stem if found else None) == name
