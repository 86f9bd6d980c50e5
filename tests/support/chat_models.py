"""Small models with a chat template, and with markers as tokens of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from support.harness import Server, running
from support.models import VOCAB_SIZE

PADDED = {"vocab_size": VOCAB_SIZE + 32}
"""Configuration of a model with room for more tokens."""

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}[assistant]"
)


def add_chat(
    source: Path,
    path: Path,
    tokens: Sequence[str],
    *,
    special: bool,
    template: str = TEMPLATE,
    parser: str = "",
) -> Path:
    """Copy a model whose output layer scores more ids than its tokenizer has, and make it chat.

    Args:
        source: The model.
        path: Directory of the copy.
        tokens: Tokens to add, with the ids from ``VOCAB_SIZE`` on.
        special: Whether these are special tokens.
        template: The chat template.
        parser: Name of mlx_lm's parser of tool calls; empty for none.
    """
    from tokenizers import AddedToken, Tokenizer

    shutil.copytree(source, path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    room = VOCAB_SIZE - tokenizer.get_vocab_size()
    # The training may have found fewer pieces than it was asked for.
    tokenizer.add_tokens([f"<unused{i}>" for i in range(room)])
    added = [AddedToken(text, special=special, normalized=False) for text in tokens]
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(template)
    config = json.loads((path / "tokenizer_config.json").read_text())
    if parser:
        config["tool_parser_type"] = parser
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@asynccontextmanager
async def serving(
    socket_dir: Path, model: Path, context_length: int = 512
) -> AsyncIterator[Server]:
    """Serve a model in this process."""
    # Imports MLX, which the tests may lack.
    from runner_server.mlx_backend import MlxBackend

    backend: Any = MlxBackend()
    async with running(socket_dir, backend) as (app, channel, ready):
        server = Server(app, backend, channel, ready)
        await server.load(str(model), parallel=4, context_length=context_length)
        yield server
