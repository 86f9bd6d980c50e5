"""How a model embeds texts, by ``modules.json`` and the files that it names.

sentence-transformers writes these files, and vectors are only comparable if they are computed as
the files say. Whatever is not computed here is therefore a problem with a name. The layout is that
of sentence-transformers 5, which also reads the ``pooling_mode_*`` flags of earlier versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner_common.model_directory.errors import ModelUnusableError
from runner_common.model_directory.json_files import read_list, read_object

_MODULES, _CONFIG = "modules.json", "config.json"
_OF_TRANSFORMER = "sentence_bert_config.json"
_OF_WHOLE = "config_sentence_transformers.json"

_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Flags of earlier versions with the names of their modes, in the order of the vector's parts."""

POOLING_MODES = frozenset(("cls", "lasttoken", "mean", "mean_sqrt_len_tokens", "weightedmean"))
"""Modes that are weighted sums of the hidden states; ``max`` is not one."""

_HARMLESS = frozenset(("max_length", "padding", "return_tensors", "truncation"))
"""Arguments of the tokenizer that do not change the ids of a text that is not cut."""


@dataclass(frozen=True, slots=True)
class EmbeddingFiles:
    """How a model embeds texts, by its files.

    Attributes:
        pooling: Modes of pooling, whose vectors are joined in this order.
        normalizes: Whether vectors are divided by their length.
        max_tokens: Longest text, in tokens; None if the files do not limit it.
        dimension: Numbers in a hidden state; None if the files do not tell.
        problem: Why the model does not embed; empty if it does.
    """

    pooling: tuple[str, ...] = ()
    normalizes: bool = False
    max_tokens: int | None = None
    dimension: int | None = None
    problem: str = ""


class _ProblemError(Exception):
    """The files ask for something that is not computed, or do not say that the model embeds."""


def read_embedding(path: Path, config: Mapping[str, Any]) -> EmbeddingFiles:
    """Read how a model embeds texts. Never raises: a model that does not embed completes texts.

    Args:
        path: The model's directory.
        config: Content of its ``config.json``.
    """
    try:
        return _read(path, config)
    except (_ProblemError, ModelUnusableError, OSError) as error:
        return EmbeddingFiles(problem=str(error))
    # A value of another type than those that sentence-transformers writes.
    except (AttributeError, TypeError, ValueError) as error:
        text = f"the files that {path / _MODULES} names have invalid contents"
        return EmbeddingFiles(problem=f"{text} ({type(error).__name__}: {error})")


def _read(path: Path, config: Mapping[str, Any]) -> EmbeddingFiles:
    if not (path / _MODULES).exists():
        raise _ProblemError(
            f"{path} has no {_MODULES}, with which the files of a model say that it embeds; if the "
            f"original model has it, copy {_MODULES}, {_OF_TRANSFORMER} and 1_Pooling from there"
        )
    _require_own_class(path / _CONFIG, config)
    pooling, normalize = _parts(path, read_list(path / _MODULES))
    _require_dense(path / _OF_WHOLE)
    if normalize:
        _require_whole_vector(path / normalize / _CONFIG)
    settings = read_object(path / pooling / _CONFIG)
    return EmbeddingFiles(
        pooling=_modes(path / pooling / _CONFIG, settings),
        normalizes=normalize is not None,
        max_tokens=_max_tokens(path / _OF_TRANSFORMER),
        dimension=_count(
            settings.get("embedding_dimension", settings.get("word_embedding_dimension"))
        ),
    )


def _require_own_class(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse hidden states that are not those of a decoder of the built-in architecture."""
    named = config.get("auto_map")
    if isinstance(named, dict) and "AutoModel" in named:
        raise _ProblemError(
            f"{file}: auto_map asks to run {named['AutoModel']!r} for embeddings; this runner "
            "never runs code that comes with a model"
        )
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        if part.get("is_causal") is False or part.get("use_bidirectional_attention"):
            raise _ProblemError(
                f"{file}: is_causal or use_bidirectional_attention asks for attention to later "
                "tokens, which mlx_lm's decoders do not have"
            )


def _parts(path: Path, modules: Sequence[Any]) -> tuple[str, str | None]:
    """Return the folders of the pooling and of the normalization, if there is one."""
    file = path / _MODULES
    kinds = [_kind(file, module) for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise _ProblemError(
            f"{file}: {', '.join(kinds) or 'no modules'}; this runner computes Transformer, "
            "Pooling and then at most Normalize"
        )
    folders = [_folder(file, module) for module in modules]
    if folders[0]:
        raise _ProblemError(f"{file}: the Transformer is in {folders[0]}, not beside the file")
    return folders[1], folders[2] if len(folders) > 2 else None


def _kind(file: Path, module: object) -> str:
    """Return the class of a module, with its package unless that is sentence-transformers."""
    name = module.get("type") if isinstance(module, dict) else None
    if not isinstance(name, str):
        raise _ProblemError(f"{file}: {module!r} is not a module")
    if isinstance(module, dict) and module.get("kwargs"):
        raise _ProblemError(f"{file}: {name} has arguments of its own: {module['kwargs']!r}")
    is_own = name.startswith("sentence_transformers.")
    return name.rpartition(".")[2] if is_own else name


def _folder(file: Path, module: Mapping[str, Any]) -> str:
    folder = module.get("path", "")
    if not isinstance(folder, str) or "/" in folder or folder in (".", "..") or "\0" in folder:
        raise _ProblemError(f"{file}: {folder!r} is not a folder of the model")
    return folder


def _require_dense(file: Path) -> None:
    """Refuse other kinds of models that have the same files."""
    if not file.exists():
        return
    kind = read_object(file).get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise _ProblemError(f"{file}: model_type is {kind!r}, not SentenceTransformer")


def _require_whole_vector(file: Path) -> None:
    if file.exists():
        _require(file, read_object(file), "module_input_name", "sentence_embedding")


def _modes(file: Path, settings: Mapping[str, Any]) -> tuple[str, ...]:
    said = settings.get("pooling_mode")
    if said is None:
        said = [mode for flag, mode in _FLAGS.items() if settings.get(flag)] or ["mean"]
    modes = [said] if isinstance(said, str) else said
    if not isinstance(modes, list) or not modes:
        raise _ProblemError(f"{file}: pooling_mode is {said!r}")
    for mode in modes:
        if not isinstance(mode, str) or mode not in POOLING_MODES:
            raise _ProblemError(
                f"{file}: pooling mode {mode!r}; this runner computes "
                f"{', '.join(sorted(POOLING_MODES))}"
            )
    if settings.get("include_prompt") is False and set(modes) != {"lasttoken"}:
        raise _ProblemError(
            f"{file}: include_prompt is false, which needs the instruction apart from the text"
        )
    return tuple(modes)


def _max_tokens(file: Path) -> int | None:
    """Return the longest text by the settings of the Transformer, which are checked."""
    if not file.exists():
        return None
    settings = read_object(file)
    if settings.get("do_lower_case"):
        raise _ProblemError(f"{file}: do_lower_case asks for texts in lower case")
    _require(file, settings, "transformer_task", "feature-extraction")
    _require(file, settings, "module_output_name", "token_embeddings")
    ways = settings.get("modality_config") or {}
    _require(file, ways.get("text") or {}, "method", "forward")
    _require(file, ways.get("text") or {}, "method_output_name", "last_hidden_state")
    for part in (settings.get("processing_kwargs") or {}).values():
        if unknown := sorted(set(part or ()) - _HARMLESS):
            raise _ProblemError(f"{file}: processing_kwargs has {', '.join(unknown)}")
    return _count(settings.get("max_seq_length"))


def _require(file: Path, settings: Mapping[str, Any], key: str, only: str) -> None:
    said = settings.get(key, only)
    if said != only:
        raise _ProblemError(f"{file}: {key} is {said!r}; this runner computes {only}")


def _count(value: object) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return value if is_count and isinstance(value, int) else None
