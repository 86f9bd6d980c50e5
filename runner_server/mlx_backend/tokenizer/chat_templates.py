"""Reading of chat templates from a model directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner_server.chat.format import ChatFormat
from runner_server.mlx_backend.tokenizer.settings import CONFIG_FILE, read_settings
from runner_server.mlx_backend.upstream.answer_markers import HasToken, answer_format
from runner_server.mlx_backend.upstream.names import tokenizer_defaults
from runner_server.mlx_backend.upstream.python_templates import python_template_file

_FILE = "chat_template.jinja"
_NAMED_FOLDER = "additional_chat_templates"
_PROCESSOR_FILE = "chat_template.json"
_DEFAULT = "default"

_MAX_BYTES = 4 * 2**20
"""Largest file with a template. The longest published template has 0.1 MiB."""


def read_chat_format(path: Path, model: dict[str, Any], has_token: HasToken) -> ChatFormat:
    """Read the chat format of a model directory. Unreadable files become ``problem``.

    The files have the precedence of transformers. ``chat_template.json``, which transformers reads
    for models with images only, comes last.

    Args:
        path: The directory.
        model: The model's configuration.
        has_token: Tells whether the vocabulary has a token.
    """
    try:
        config = _read_json(path / CONFIG_FILE)
        templates = (
            _template_files(path)
            or _templates(config.get("chat_template"), path / CONFIG_FILE)
            or _templates(
                _read_json(path / _PROCESSOR_FILE).get("chat_template"), path / _PROCESSOR_FILE
            )
        )
        defaults = tokenizer_defaults(model)
        return ChatFormat(
            templates=templates,
            special_tokens=read_settings(path).roles,
            python_template=_python_template(config, defaults, is_needed=not templates),
            answer=answer_format(has_token, config, defaults, _for_tools(templates)),
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        return ChatFormat(problem=f"the chat template in {path} cannot be read: {error}")


def _for_tools(templates: Mapping[str, str]) -> str:
    """Return the template for conversations with tools; empty if there is none."""
    return templates.get("tool_use", templates.get(_DEFAULT, ""))


def _template_files(path: Path) -> dict[str, str]:
    named = sorted((path / _NAMED_FOLDER).glob("*.jinja"))
    files = {_DEFAULT: path / _FILE} | {file.name.removesuffix(".jinja"): file for file in named}
    return {name: _read(file).decode() for name, file in files.items() if file.is_file()}


def _templates(found: Any, file: Path) -> dict[str, str]:
    """Return the templates of a configuration: one text, or a list of named ones."""
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    elif isinstance(found, str):
        found = {_DEFAULT: found}
    templates: dict[str, str] = found or {}
    is_named = isinstance(templates, dict)
    if not is_named or not all(isinstance(t, str) for item in templates.items() for t in item):
        raise TypeError(f"chat_template of {file} is neither a text nor a list of named ones")
    return templates


def _python_template(
    config: Mapping[str, Any], defaults: Mapping[str, Any], *, is_needed: bool
) -> str:
    """Return the file of mlx_lm's template: the one that is named, or the default if needed.

    Raises:
        ValueError: mlx_lm lacks the template that the files name.
    """
    if (named := config.get("chat_template_type")) is not None:
        if not (file := python_template_file(named)):
            raise ValueError(f"chat_template_type is {named!r}, which mlx_lm lacks")
        return file
    return python_template_file(defaults.get("chat_template_type")) if is_needed else ""


def _read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if the file does not exist."""
    found = json.loads(_read(file)) if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def _read(file: Path) -> bytes:
    with file.open("rb") as opened:
        data = opened.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{file} has more than {_MAX_BYTES} bytes")
    return data
