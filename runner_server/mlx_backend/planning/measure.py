"""Measurement of a model with lazy weights. Nothing is computed and no weights are read."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from functools import partial
from typing import cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from runner_common.cores import usable_cores
from runner_common.model_directory import ModelDirectory
from runner_server.host.blas import blas_of
from runner_server.mlx_backend.planning.kv_memory import probe
from runner_server.mlx_backend.planning.sizes import ModelSizes
from runner_server.mlx_backend.planning.tokenizer_memory import tokenizer_memory
from runner_server.mlx_backend.planning.working_memory import (
    batch_prefill_bytes,
    decode_bytes,
    logits_bytes,
    prefill_bytes,
    require_batches,
    text_bytes,
)
from runner_server.mlx_backend.sampling.mask_rows import kept_bytes
from runner_server.mlx_backend.tokenizer.chat_templates import read_chat_format

_MIB = 1 << 20

PREFILL_CHUNK = {"cpu": 128, "gpu": 1024}
"""Most prompt tokens in one prefill chunk, which bounds the memory of the chunk."""

ROWS_TOGETHER = 4
"""Most prefill chunks computed in one call, if memory permits."""

_READ_TOGETHER_BYTES = 64 * _MIB
"""Most bytes of source tensors alive at once: those of 32 MiB of weights, up to twice as wide."""

_PROCESS_BYTES = 102 * _MIB
"""Memory of a server with a tiny model: Python, gRPC, MLX and their heaps. 70 to 80 MiB for most
types, 15 more if MLX compiles kernels that are not cached yet, and up to 10 more if the system
maps more pages of the libraries around each one that is used."""

_STREAM_BYTES = _MIB // 4
"""Process memory per sequence: messages, token lists, thread stacks."""

_IMPORTED_BYTES = {"transformers": 75 * _MIB, "numpy": 12 * _MIB}
"""Memory of packages that only some models need: transformers for a tokenizer (it imports NumPy
too), NumPy for mlx_lm's modules of plamo, dbrx and gpt_bigcode. NumPy 2.4 takes 16 MiB, which
``_PROCESS_BYTES`` partly covers."""

_CONSTRAINT_BYTES, _CONSTRAINT_TOKEN_BYTES = 8 * _MIB, 400
"""Memory of constraints, if llguidance is installed: the library and some grammars, and the tokens
of the model as the library keeps them. Measured with llguidance 1.9: 5 MiB; 4 MiB for 2,048 tokens,
57 for 151,936. 64 schemas of 30 properties take 15 MiB."""

_CHAT_BYTES = 20 * _MIB
"""Memory of the process that renders chat templates, which the first conversation starts, without
the pages that it shares with the server. Measured on an AMD EPYC: 11 MiB after one template, 17
after 70 published ones and all parsers of tool calls, 21 after a conversation of 10,000 messages.
A larger one is ended above 64 MiB."""

_MKL_BYTES, _MKL_CORE_BYTES = 32 * _MIB, 2 * _MIB
"""Memory of MKL: its libraries, of which 26 MiB are resident, and the buffers of each thread.

Measured with MKL 2026.2 on an AMD EPYC, beyond a process with OpenBLAS: 28 MiB with 1 thread, 31
with 2, 46 with 16."""


def measure(
    model: Module, directory: ModelDirectory, context_length: int, parallel: int
) -> ModelSizes:
    """Return the sizes of a model.

    Args:
        model: A model with lazy weights, already cast to the dtype of the load.
        directory: The model's files.
        context_length: Longest sequence of the load, in tokens.
        parallel: Most sequences decoded together.

    Raises:
        RowsApartError: The model cannot decode several sequences at once, and ``parallel`` is more
            than 1. The function ``decode_bytes`` of the result may raise it, too.
        ModelUnsupported: The model cannot run.
    """
    device = device_kind()
    seen = probe(model, PREFILL_CHUNK[device])
    if parallel > 1:
        require_batches(model)
    chunk = min(PREFILL_CHUNK[device], context_length)
    together = min(ROWS_TOGETHER, parallel)
    alone_bytes = prefill_bytes(model, chunk, context_length)
    rows_bytes = batch_prefill_bytes(model, together, chunk)
    if not directory.embedding.problem:
        # The last layer's states are computed too, which no prompt needs.
        alone_bytes = max(alone_bytes, text_bytes(model, 1, chunk, context_length))
        rows_bytes = max(rows_bytes, text_bytes(model, together, chunk, chunk))
    return ModelSizes(
        device=device,
        context_length=context_length,
        probe=seen,
        weight_bytes=weight_bytes(model),
        chunk=chunk,
        chunks_together=together,
        prefill_bytes=alone_bytes,
        together_bytes=rows_bytes,
        logits_bytes=logits_bytes(seen.vocab_size),
        decode_bytes=partial(decode_bytes, model, tokens=context_length),
        mask_bytes=kept_bytes(seen.vocab_size) if _takes_constraints() else 0,
        load_transient_bytes=load_transient_bytes(model, directory),
        tokenizer=tokenizer_memory(directory.path),
        process_bytes=process_bytes(parallel, device)
        + constraint_bytes(seen.vocab_size)
        + chat_bytes(directory),
    )


def process_bytes(parallel: int, device: str) -> int:
    """Return the memory of the server's process itself: interpreter, libraries and heap, in bytes.

    Call after the model is built and its tokenizer read, because these import further packages.
    """
    imported = (size for name, size in _IMPORTED_BYTES.items() if name in sys.modules)
    size = _PROCESS_BYTES + parallel * _STREAM_BYTES + max(imported, default=0)
    if blas_of(device).startswith("MKL"):
        size += _MKL_BYTES + usable_cores().count * _MKL_CORE_BYTES
    return size


def constraint_bytes(vocab_size: int) -> int:
    """Return the memory of constraints, in bytes, which the first one takes."""
    if not _takes_constraints():
        return 0
    return _CONSTRAINT_BYTES + _CONSTRAINT_TOKEN_BYTES * vocab_size


def chat_bytes(directory: ModelDirectory) -> int:
    """Return the memory of the process that renders chat templates, in bytes."""
    # Only the markers in answers depend on the tokens.
    chat = read_chat_format(directory.path, directory.configuration.values, lambda _token: False)
    return _CHAT_BYTES if chat.has_template else 0


def _takes_constraints() -> bool:
    return importlib.util.find_spec("llguidance") is not None


def load_transient_bytes(model: Module, directory: ModelDirectory) -> int:
    """Return the peak bytes for reading weight files, in addition to the final weights.

    Weights are converted from source tensors, which are freed once the copies exist. The sources
    of 32 MiB of weights, or of a single larger one, are alive at the same time. A narrow source
    exists a second time, in 16 bits, before it is widened; a wide source is twice as large as its
    copy. A weight with the shape and size of a stored tensor is that tensor, and needs no copy.
    """
    tensors = [stored.tensor for stored in directory.tensors.values()]
    stored = Counter((tensor.shape, tensor.nbytes) for tensor in tensors)
    widest = max((tensor.nbytes // max(1, tensor.size) for tensor in tensors), default=0)
    sources = []
    for value in arrays(model):
        kind = (value.shape, value.nbytes)
        if stored[kind]:
            stored[kind] -= 1
        else:
            sources.append(value.nbytes * (2 if widest > value.dtype.size else 1))
    return max(max(sources, default=0), min(sum(sources), _READ_TOGETHER_BYTES))


def weight_bytes(model: Module) -> int:
    """Return the bytes of a model's weights in their current dtypes."""
    return sum(value.nbytes for value in arrays(model))


def arrays(model: Module) -> list[mx.array]:
    """Return the weights of a model."""
    named = cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))
    return [value for _, value in named]


def device_kind() -> str:
    """Return the kind of MLX's default device, ``"gpu"`` or ``"cpu"``."""
    return "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
