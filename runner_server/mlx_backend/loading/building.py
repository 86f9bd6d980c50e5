"""Building of a model with lazy weights from a directory. No weights are read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from runner_common.model_directory import (
    Located,
    ModelDirectory,
    ModelUnusableError,
    read_model_directory,
    text_part,
)
from runner_server.engine.types import Dtype, LoadSpec
from runner_server.errors import ModelUnsupported, RunnerFault
from runner_server.mlx_backend.adapters.attaching import attach
from runner_server.mlx_backend.adapters.selection import Attached
from runner_server.mlx_backend.loading.finding import find_adapters
from runner_server.mlx_backend.loading.weight_files import WeightFiles
from runner_server.mlx_backend.model.activations import use_named_gelu
from runner_server.mlx_backend.model.casting import cast_weights, casting_notes, widen_experts
from runner_server.mlx_backend.model.differences import Exactness
from runner_server.mlx_backend.model.exactness import compare
from runner_server.mlx_backend.model.kv_bits import quantize_caches
from runner_server.mlx_backend.model.rotary import settle_rope
from runner_server.mlx_backend.planning.measure import device_kind
from runner_server.mlx_backend.planning.plan import context_in_force
from runner_server.mlx_backend.upstream.names import BuiltModel, build_model, dequantize_model

if TYPE_CHECKING:
    from runner_server.mlx_backend.sharding import Shard

logger = logging.getLogger(__name__)

_MAX_ERROR_CHARS = 300

_MX_DTYPES = {
    Dtype.FLOAT32: mx.float32,
    Dtype.BFLOAT16: mx.bfloat16,
    Dtype.FLOAT16: mx.float16,
}


@dataclass(frozen=True)
class Built:
    """Model with lazy weights in the requested dtype, sharded if there are several ranks.

    Attributes:
        model: The model.
        config: Its configuration, including mlx_lm's additions about quantization.
        spec: The load, with the values that the ranks agreed on.
        context_length: The longest sequence of the load, in tokens.
        warnings: Differences between the model's answers and the specification in its files.
        adapters: Its adapters.
    """

    model: Module
    config: dict[str, Any]
    spec: LoadSpec
    context_length: int
    warnings: tuple[str, ...]
    adapters: Attached


def read_directory(located: Located) -> ModelDirectory:
    """Read a model's files, except the weights.

    Raises:
        ModelUnsupported: The files cannot be used.
    """
    try:
        directory = read_model_directory(located.path)
    except ModelUnusableError as error:
        raise ModelUnsupported(str(error), model=str(located.path)) from error
    notes = (located.note, *directory.notes) if located.note else directory.notes
    return replace(directory, notes=notes)


@contextmanager
def before_weights(path: Path) -> Iterator[None]:
    """Turn any unexpected error into ``ModelUnsupported``.

    Before weights are read, the model's files are the only input, so they are the cause.
    """
    try:
        yield
    except (RunnerFault, MemoryError):
        raise
    except Exception as error:
        logger.exception("%s cannot be loaded", path)
        raise ModelUnsupported(
            f"{path} cannot be loaded ({_one_line(error)}): its configuration asks for "
            "something that mlx_lm cannot compute; the runner's log has the traceback",
            model=str(path),
        ) from error


def _one_line(error: Exception) -> str:
    """Return an error of mlx_lm on one line, shortened because some list every tensor."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _MAX_ERROR_CHARS else f"{text[:_MAX_ERROR_CHARS]}..."
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def build(directory: ModelDirectory, spec: LoadSpec, shard: Shard | None) -> Built:
    """Build a model in the requested dtype, sharded if there are several ranks.

    Args:
        directory: The model's files.
        spec: The load.
        shard: Selects this rank's part of the model; None for the whole model.

    Raises:
        ModelUnsupported: mlx_lm cannot build the model, or computes it differently from its files,
            or an adapter does not fit it.
        InvalidField: The requested context is too long, or too long to be exact; or the keys and
            values cannot be quantized.
    """
    unread, exactness = _build(directory)
    config = unread.config
    exactness.require(directory.path, allow=spec.allow_inexact)
    if shard:
        spec = shard.split(unread.model, config, spec)
    model = _converted(directory, unread, spec, shard)
    context = context_in_force(spec, directory.configuration.context_length, exactness)
    settle_rope(model, text_part(config), unread.arguments, context)
    if spec.kv_bits:
        quantize_caches(model, spec.kv_bits, directory.configuration.model_type)
    warnings = (*directory.notes, *exactness.warnings(context), *casting_notes(model))
    adapters = attach(
        model,
        find_adapters(spec.adapters),
        WeightFiles.of(unread.model),
        widens=spec.dtype is Dtype.FLOAT32,
    )
    return Built(model, config, spec, context, warnings, adapters)


def _build(directory: ModelDirectory) -> tuple[BuiltModel, Exactness]:
    files, path = WeightFiles(), directory.path
    model_type = directory.configuration.model_type
    try:
        built = build_model(
            path, directory.configuration.values, directory.weight_files, _load(files, directory)
        )
        use_named_gelu(text_part(built.config), built)
        # Some models evaluate weights while they are built; wait for those reads to end.
        files.settle()
        files.check()
        exactness = Exactness(compare(directory, built, files.unused()))
    except Exception as error:
        raise ModelUnsupported(
            f"{path} is not a model that mlx_lm can build ({_one_line(error)}); "
            f"expected weights that fit config.json, whose model_type is {model_type!r}",
            model=str(path),
        ) from error
    finally:
        # Layers initialize weights from the random state before mlx_lm replaces the weights. This
        # leaves a chain of unevaluated states, one per layer, which would grow with each load.
        mx.eval(mx.random.state)
    files.attach(built.model)
    return built, exactness


def _load(files: WeightFiles, directory: ModelDirectory) -> Callable[[str], dict[str, mx.array]]:
    """Return a function that reads a weight file, with the names that mlx_lm expects."""
    prefix = directory.name_prefix
    return lambda file: {f"{prefix}{name}": value for name, value in files.load(file).items()}


def _converted(
    directory: ModelDirectory, built: BuiltModel, spec: LoadSpec, shard: Shard | None
) -> Module:
    """Cast a built model to the requested dtype, sharded if there are several ranks."""
    if shard is None or spec.dtype is Dtype.AS_STORED or not built.config.get("quantization"):
        return _convert(built.model, spec.dtype)
    # mlx_lm dequantizes whole layers only: build the model anew, and shard it afterwards.
    built, _ = _build(directory)
    model = _convert(built.model, spec.dtype)
    shard.split(model, built.config, spec)
    return model


def _convert(model: Module, dtype: Dtype) -> Module:
    """Cast lazy weights to a dtype; MLX converts each weight after reading it."""
    if dtype is not Dtype.AS_STORED:
        model = dequantize_model(model)
        cast_weights(model, _MX_DTYPES[dtype])
    if device_kind() == "cpu":
        widen_experts(model)
    return model
