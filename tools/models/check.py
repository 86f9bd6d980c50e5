"""Checks of one model type."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from runner_server.engine.backend import LoadedModel
from runner_server.engine.types import Dtype, LoadSpec
from runner_server.errors import InvalidField, RunnerFault
from runner_server.mlx_backend import MlxBackend
from runner_server.mlx_backend.loading.kv_trial import rounded_caches
from tools.local_batch import LocalBatch
from tools.memory.models import NotWrittenError, scaled, write_model
from tools.models.generate import (
    Row,
    generate_in_batch,
    generate_with_drafts,
    generate_with_mlx_lm,
    mlx_lm_model,
)
from tools.models.likeness import TOLERANCE, difference

logger = logging.getLogger(__name__)

RIGHT = "yes"
ALONE = "alone"
NOT_TRIED = "-"
REFUSED = "refused"

_TOLERANCE_16_BITS = 0.2
"""Tolerance between a 16-bit row in a batch and the same row alone, in natural logarithms."""

_CUT_MATTERS = {
    "plamo3": "in prefill, mlx_lm attends to one token more than its sliding-window cache keeps, "
    "so its own log probabilities vary by up to 0.1 with how the prompt is split",
}
"""Types for which mlx_lm itself depends on how a prompt is split, with the reason. The runner
splits prompts by time, so every comparison of these types has ``_TOLERANCE_OF_CUTS``."""

_TOLERANCE_OF_CUTS = 0.1

_MIB = 1 << 20

_KV_BITS = 4
"""The fewest bits, with which a fault has the largest effect."""

_LONG = 150
"""Prompt length that exceeds the windows and chunks of every tiny model (32 to 64 tokens) and one
prefill chunk (128 tokens on a CPU)."""


@dataclass
class Verdict:
    """Results for one model type: each ``yes`` or a description of the fault.

    Attributes:
        model_type: Name of the type.
        alone: A single row compared with mlx_lm's own generation.
        batch: Four staggered rows compared with each row alone; ``alone`` for types that cannot
            be batched.
        prefix: Generation with the prefix cache compared with generation without.
        kv_bits: Keys and values in 4 bits: in a batch, with the prefix cache, with drafts, and
            compared with mlx_lm's generation with plain caches of rounded numbers; ``refused`` for
            types whose keys and values cannot be quantized.
        drafts: Generation with right and wrong drafts compared with generation without; not tried
            with caches that cannot be cut back.
        narrow: bfloat16 as stored: rows in a batch compared with each row alone.
        quantized: 4 bits as stored, compared with mlx_lm, and in a batch.
        dequantized: 4 bits dequantized to float32, compared in the same way.
        notes: Warnings from the load.
    """

    model_type: str
    alone: str = NOT_TRIED
    batch: str = NOT_TRIED
    prefix: str = NOT_TRIED
    drafts: str = NOT_TRIED
    kv_bits: str = NOT_TRIED
    narrow: str = NOT_TRIED
    quantized: str = NOT_TRIED
    dequantized: str = NOT_TRIED
    notes: str = ""

    @property
    def is_right(self) -> bool:
        """True if every result is right or was not tried."""
        whole = (self.alone, self.batch, self.prefix, self.drafts)
        found = (*whole, self.kv_bits, self.narrow, self.quantized, self.dequantized)
        return all(each in (RIGHT, ALONE, NOT_TRIED, REFUSED) for each in found)


class Checker:
    """Checker of model types.

    Args:
        backend: The runner's MLX backend, open on this thread.
        quick: Check float32 only; the other formats take long.
    """

    def __init__(self, backend: MlxBackend, *, quick: bool = False) -> None:
        self._backend = backend
        self._quick = quick

    def check(self, model_type: str) -> Verdict:
        """Run every check on a type of the catalog."""
        verdict = Verdict(model_type)
        verdict.alone = self._attempt(self._float32, verdict)
        verdict.kv_bits = self._attempt(self._quantized_kv, verdict)
        if not self._quick:
            verdict.narrow = self._attempt(self._narrow, verdict)
            verdict.quantized = self._attempt(self._four_bits, verdict, dequantized=False)
            verdict.dequantized = self._attempt(self._four_bits, verdict, dequantized=True)
        self._backend.release()
        return verdict

    def _attempt(self, work: Callable[..., str], verdict: Verdict, **options: bool) -> str:
        with tempfile.TemporaryDirectory() as folder:
            try:
                return work(Path(folder), verdict, **options)
            except RunnerFault as fault:
                return f"refused: {fault}"
            except Exception as error:
                logger.debug("%s", verdict.model_type, exc_info=error)
                return f"{type(error).__name__}: {error}"

    def _float32(self, path: Path, verdict: Verdict) -> str:
        write_model(path, scaled(verdict.model_type))
        model = self._load(path)
        why = _CUT_MATTERS.get(verdict.model_type)
        verdict.notes = "; ".join([*model.info.warnings, *filter(None, [why])])
        tolerance = _tolerance(verdict)
        verdict.batch = _compare_batch(model, tolerance)
        verdict.prefix = self._prefix(path, model, tolerance)
        verdict.drafts = _compare_drafts(model, tolerance)
        return _compare_with_mlx_lm(model, mlx_lm_model(path, dequantize=False), tolerance)

    def _quantized_kv(self, path: Path, verdict: Verdict) -> str:
        write_model(path, scaled(verdict.model_type))
        try:
            model = self._load(path, kv_bits=_KV_BITS)
        except InvalidField:
            return REFUSED
        tolerance = _tolerance(verdict)
        found = [_compare_batch(model, tolerance), self._prefix(path, model, tolerance, _KV_BITS)]
        found.append(_compare_drafts(model, tolerance))
        reference = mlx_lm_model(path, dequantize=False)
        pieces = cast("Any", model)._pieces  # noqa: SLF001 - the kinds of the layers' caches
        found.append(
            _compare_with_mlx_lm(model, reference, tolerance, lambda: rounded_caches(pieces.new()))
        )
        wrong = (each for each in found if each not in (RIGHT, ALONE, NOT_TRIED))
        return next(wrong, found[0])

    def _narrow(self, path: Path, verdict: Verdict) -> str:
        write_model(path, scaled(verdict.model_type), dtype="bfloat16")
        return _compare_batch(self._load(path, Dtype.AS_STORED), _TOLERANCE_16_BITS)

    def _four_bits(self, path: Path, verdict: Verdict, *, dequantized: bool) -> str:
        try:
            write_model(path, scaled(verdict.model_type), bits=4)
            reference = mlx_lm_model(path, dequantize=dequantized)
        except (NotWrittenError, ValueError) as error:
            is_written = not isinstance(error, NotWrittenError)
            why = f"mlx_lm cannot load it quantized ({error})" if is_written else str(error)
            if why not in verdict.notes:
                verdict.notes = "; ".join(filter(None, [verdict.notes, why]))
            return NOT_TRIED
        model = self._load(path, Dtype.FLOAT32 if dequantized else Dtype.AS_STORED)
        tolerance = _tolerance(verdict)
        found = _compare_batch(model, tolerance)
        if found not in (RIGHT, ALONE):
            return found
        return _compare_with_mlx_lm(model, reference, tolerance)

    def _prefix(self, path: Path, plain: LoadedModel, tolerance: float, kv_bits: int = 0) -> str:
        """Compare cached runs of extended, diverging and repeated prompts with uncached ones."""
        prompts = [
            _prompt(_LONG),
            [*_prompt(_LONG), *_prompt(40, 5)],
            [*_prompt(_LONG)[: _LONG // 2], *_prompt(90, 9)],
            [*_prompt(_LONG), *_prompt(40, 5)],
            [*_prompt(_LONG), *_prompt(20, 5), *_prompt(50, 3)],
        ]
        kept = self._load(path, prefix_cache_bytes=64 * _MIB, kv_bits=kv_bits)
        cached = 0
        for prompt in prompts:
            some, other = Row(prompt), Row(prompt)
            generate_in_batch(LocalBatch.of(kept), [some])
            generate_in_batch(LocalBatch.of(plain), [other])
            cached += some.cached
            if wrong := difference(some.tokens, other.tokens, tolerance):
                return f"{wrong} with {some.cached} tokens cached"
        return RIGHT if cached else "the prefix cache was not used"

    def _load(
        self,
        path: Path,
        dtype: Dtype = Dtype.AS_STORED,
        prefix_cache_bytes: int = 0,
        kv_bits: int = 0,
    ) -> LoadedModel:
        spec = LoadSpec(
            str(path),
            parallel=4,
            dtype=dtype,
            context_length=512,
            prefix_cache_bytes=prefix_cache_bytes,
            kv_bits=kv_bits,
            # The reference is mlx_lm, even where it ignores settings of the model.
            allow_inexact=True,
        )
        return self._backend.load(spec, lambda _progress: None)


def _tolerance(verdict: Verdict) -> float:
    return _TOLERANCE_OF_CUTS if verdict.model_type in _CUT_MATTERS else TOLERANCE


def _prompt(length: int, step: int = 7) -> list[int]:
    """Return a prompt of ids from 1 to 199: every tiny model has these ids, and 0 ends the text."""
    return [1 + (step * index * index + 3 * index) % 199 for index in range(length)]


def _rows() -> list[Row]:
    lengths = (_LONG, 1, 3, 40)
    return [Row(_prompt(size, 7 + size), join_step=2 * row) for row, size in enumerate(lengths)]


def _compare_batch(model: LoadedModel, tolerance: float = TOLERANCE) -> str:
    """Compare four rows in a batch with each row alone."""
    if model.info.parallel == 1:
        generate_in_batch(LocalBatch.of(model), [Row(_prompt(_LONG))])
        return ALONE
    rows = _rows()
    generate_in_batch(LocalBatch.of(model), rows)
    for row in rows:
        own = Row(row.prompt)
        generate_in_batch(LocalBatch.of(model), [own])
        if wrong := difference(row.tokens, own.tokens, tolerance):
            return f"row of {len(row.prompt)} tokens: {wrong}"
    return RIGHT


def _compare_drafts(model: LoadedModel, tolerance: float) -> str:
    """Compare a row whose every second draft is wrong at its third token with one without."""
    if not model.max_draft:
        return NOT_TRIED
    for length in (3, _LONG):
        own = Row(_prompt(length))
        generate_in_batch(LocalBatch.of(model), [own])
        drafted = Row(own.prompt)
        generate_with_drafts(model, drafted, [entry.token_id for entry in own.tokens])
        if wrong := difference(drafted.tokens, own.tokens, tolerance):
            return f"prompt of {length} tokens: {wrong}"
    return RIGHT


def _compare_with_mlx_lm(
    model: LoadedModel,
    reference: Any,
    tolerance: float,
    new_caches: Callable[[], Sequence[Any] | None] = lambda: None,
) -> str:
    for length in (1, 3, 40, _LONG):
        row = Row(_prompt(length))
        generate_in_batch(LocalBatch.of(model), [row])
        expected = generate_with_mlx_lm(reference, row.prompt, new_caches())
        if wrong := difference(row.tokens, expected, tolerance):
            return f"prompt of {length} tokens: {wrong}"
    return RIGHT
