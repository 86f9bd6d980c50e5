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
from runner_server.chat.environment import compiled, render
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


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_the_parser_of_tool_calls_is_the_one_of_mlx_lm(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    tokenizer = SimpleNamespace(chat_template=source, get_vocab=dict)
    name = pytest.importorskip("mlx_lm.tokenizer_utils")._infer_tool_parser(tokenizer)
    found = answer_format(lambda _: False, {}, {}, source).tool_parser
    assert (Path(found).stem if found else None) == name
