"""What is checked of one type of model."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner_server.engine.backend import LoadedModel
from runner_server.engine.types import Dtype, LoadSpec
from runner_server.errors import RunnerFault
from runner_server.mlx_backend import MlxBackend
from tools.memory.models import NotWrittenError, scaled, write_model
from tools.models.generate import Row, by_mlx_lm, mlx_lm_model, together
from tools.models.likeness import TOLERANCE, difference

logger = logging.getLogger(__name__)

RIGHT = "yes"
ALONE = "alone"
NOT_TRIED = "-"

_TOLERANCE_16_BITS = 0.2
"""Batches of 16 bits are held against each row alone, not bit by bit."""

_CUT_MATTERS = {
    "plamo3": "mlx_lm lets a prompt see one token more than its cache of a window keeps, so that "
    "its own answers depend on how the prompt is cut, by up to 0.1 in log probabilities",
}
"""Types whose prefix cache is held to what mlx_lm differs from itself, and why."""

_TOLERANCE_OF_CUTS = 0.1

_MIB = 1 << 20

_LONG = 150
"""Tokens beyond the windows and chunks of all tiny models (32 to 64), and beyond one chunk of
a prompt (128 on a CPU)."""


@dataclass
class Verdict:
    """What was found of a type. Each is ``yes``, or says in words what is wrong.

    Attributes:
        model_type: The type.
        alone: One completion, against mlx_lm's own generation.
        batch: Four staggered rows, against each alone; ``alone`` where it runs alone.
        prefix: With prefix cache, against without.
        narrow: As bfloat16, stored: batch against each alone.
        quantized: 4 bits as stored, against mlx_lm; and in a batch.
        dequantized: The same to float32.
        notes: What the model warns of.
    """

    model_type: str
    alone: str = NOT_TRIED
    batch: str = NOT_TRIED
    prefix: str = NOT_TRIED
    narrow: str = NOT_TRIED
    quantized: str = NOT_TRIED
    dequantized: str = NOT_TRIED
    notes: str = ""

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong."""
        found = (self.alone, self.batch, self.prefix, self.narrow, self.quantized, self.dequantized)
        return all(each in (RIGHT, ALONE, NOT_TRIED) for each in found)


class Checker:
    """Checks types of models, one after another.

    Args:
        backend: The runner's model library, open on this thread.
        quick: Leave out what takes long: other formats than float32.
    """

    def __init__(self, backend: MlxBackend, *, quick: bool = False) -> None:
        self._backend = backend
        self._quick = quick

    def check(self, model_type: str) -> Verdict:
        """Check a type of the catalog."""
        verdict = Verdict(model_type)
        verdict.alone = self._tried(self._float32, verdict)
        if not self._quick:
            verdict.narrow = self._tried(self._narrow, verdict)
            verdict.quantized = self._tried(self._four_bits, verdict, dequantized=False)
            verdict.dequantized = self._tried(self._four_bits, verdict, dequantized=True)
        self._backend.release()
        return verdict

    def _tried(self, work: Callable[..., str], verdict: Verdict, **options: bool) -> str:
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
        verdict.batch = _batch(model)
        verdict.prefix = self._prefix(path, _TOLERANCE_OF_CUTS if why else TOLERANCE)
        return _against_mlx_lm(model, mlx_lm_model(path, wide=False))

    def _narrow(self, path: Path, verdict: Verdict) -> str:
        write_model(path, scaled(verdict.model_type), dtype="bfloat16")
        return _batch(self._load(path, Dtype.AS_STORED), _TOLERANCE_16_BITS)

    def _four_bits(self, path: Path, verdict: Verdict, *, dequantized: bool) -> str:
        try:
            write_model(path, scaled(verdict.model_type), bits=4)
            reference = mlx_lm_model(path, wide=dequantized)
        except (NotWrittenError, ValueError) as error:
            is_written = not isinstance(error, NotWrittenError)
            why = f"mlx_lm cannot load it quantized ({error})" if is_written else str(error)
            if why not in verdict.notes:
                verdict.notes = "; ".join(filter(None, [verdict.notes, why]))
            return NOT_TRIED
        model = self._load(path, Dtype.FLOAT32 if dequantized else Dtype.AS_STORED)
        found = _batch(model)
        if found not in (RIGHT, ALONE):
            return found
        return _against_mlx_lm(model, reference)

    def _prefix(self, path: Path, tolerance: float) -> str:
        """Extensions, a divergence in the middle, the same again: with cache and without."""
        prompts = [
            _prompt(_LONG),
            [*_prompt(_LONG), *_prompt(40, 5)],
            [*_prompt(_LONG)[: _LONG // 2], *_prompt(90, 9)],
            [*_prompt(_LONG), *_prompt(40, 5)],
            [*_prompt(_LONG), *_prompt(20, 5), *_prompt(50, 3)],
        ]
        kept, plain = self._load(path, prefix_cache_bytes=64 * _MIB), self._load(path)
        cached = 0
        for prompt in prompts:
            some, other = Row(prompt), Row(prompt)
            together(kept.new_batch(), [some])
            together(plain.new_batch(), [other])
            cached += some.cached
            if wrong := difference(some.said, other.said, tolerance):
                return f"{wrong} with {some.cached} tokens cached"
        return RIGHT if cached else "nothing was taken from it"

    def _load(
        self, path: Path, dtype: Dtype = Dtype.AS_STORED, prefix_cache_bytes: int = 0
    ) -> LoadedModel:
        spec = LoadSpec(
            str(path),
            parallel=4,
            dtype=dtype,
            context_length=512,
            prefix_cache_bytes=prefix_cache_bytes,
            # Answers are held against mlx_lm's own, whatever it leaves out.
            allow_inexact=True,
        )
        return self._backend.load(spec, lambda _progress: None)


def _prompt(length: int, step: int = 7) -> list[int]:
    """A prompt of ids below 200, which every tiny model has; 0 would end the text."""
    return [1 + (step * place * place + 3 * place) % 199 for place in range(length)]


def _rows() -> list[Row]:
    lengths = (_LONG, 1, 3, 40)
    return [Row(_prompt(size, 7 + size), late=2 * row) for row, size in enumerate(lengths)]


def _batch(model: LoadedModel, tolerance: float = TOLERANCE) -> str:
    """Four rows together, against each alone."""
    if model.info.parallel == 1:
        together(model.new_batch(), [Row(_prompt(_LONG))])
        return ALONE
    rows = _rows()
    together(model.new_batch(), rows)
    for row in rows:
        own = Row(row.prompt)
        together(model.new_batch(), [own])
        if wrong := difference(row.said, own.said, tolerance):
            return f"a row of {len(row.prompt)}: {wrong}"
    return RIGHT


def _against_mlx_lm(model: LoadedModel, reference: Any) -> str:
    for length in (1, 3, 40, _LONG):
        row = Row(_prompt(length))
        together(model.new_batch(), [row])
        if wrong := difference(row.said, by_mlx_lm(reference, row.prompt)):
            return f"a prompt of {length}: {wrong}"
    return RIGHT
