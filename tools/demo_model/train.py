"""Train the demo model: ``python -m tools.demo_model.train --out DIRECTORY``.

The schedule follows the clock rather than a step count, so that a run takes the requested time on
fast and busy machines alike. A usable model is written every few minutes.
"""

import argparse
import logging
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.nn.utils import value_and_grad
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.llama import Model
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tools.demo_model import bundle, corpus, fast
from tools.demo_model.dialogues import Dialogue, dialogues

log = logging.getLogger("demo.train")

PEAK_RATE = 3e-3
FLOOR = 0.02
WARMUP = 0.03
CLIP = 1.0
TOKENS_A_STEP = 2048
SHORT, LONG = 256, bundle.CONTEXT
# Short windows are twice as fast; the last part of the run uses full-length windows, to train
# every position that config.json allows.
LONG_AFTER = 0.88
# Of documents, their exchanges, and written conversations.
SHARES = (0.36, 0.14, 0.5)
DIALOGUES, HELD_OUT_DIALOGUES = 6000, 200
# Two fifths of the tokens of a written conversation are answers, and only these are learned.
ANSWER_WEIGHT = 3.0
NEW_CONVERSATION = 0.6
REPORT_SECONDS = 420.0
VALIDATION_ROWS = 48
# Independent of --seed, so that runs can be compared.
VALIDATION_SEED = 0

Batch = tuple[mx.array, mx.array, mx.array]
"""Inputs, targets, and the weight of each target in the loss."""
Ids = NDArray[np.uint16]
Weights = NDArray[np.float32]
Window = tuple[Ids, Weights]

# MLX does not annotate this function.
clip_gradient: Callable[[Any, float], tuple[Any, mx.array]] = optim.clip_grad_norm


@dataclass(frozen=True)
class Stream:
    """Concatenated token ids, with the indices where a window may start.

    ``weights`` are those of the tokens in the loss; 1 if absent.
    """

    ids: Ids
    starts: NDArray[np.int64] | None = None
    weights: Weights | None = None

    def window(self, rng: np.random.Generator, length: int) -> Window:
        """Return ``length`` + 1 tokens from a random start, and their weights."""
        last = len(self.ids) - length - 1
        if self.starts is None:
            at = int(rng.integers(0, last))
        else:
            at = min(int(rng.choice(self.starts)), last)
        ids = self.ids[at : at + length + 1]
        if self.weights is None:
            return ids, np.ones(len(ids), np.float32)
        return ids, self.weights[at : at + length + 1]


@dataclass(frozen=True)
class Data:
    """The raw documents, their exchanges and the written conversations of one side of the split."""

    raw: Stream
    chat: Stream
    dialogues: Stream

    def batch(self, rng: np.random.Generator, length: int) -> Batch:
        """Draw one step's inputs, targets and weights, mixing all kinds of text."""
        streams = rng.choice(3, TOKENS_A_STEP // length, p=SHARES)
        kinds = (self.raw, self.chat, self.dialogues)
        return _as_batch([kinds[index].window(rng, length) for index in streams])


def _as_batch(rows: Sequence[Window]) -> Batch:
    table = np.stack([ids for ids, _ in rows]).astype(np.int32)
    weights = np.stack([weights for _, weights in rows])
    return mx.array(table[:, :-1]), mx.array(table[:, 1:]), mx.array(weights[:, 1:])


def encode(
    tokenizer: Tokenizer,
    sources: Sequence[corpus.Source],
    written: Sequence[Dialogue],
    rng: np.random.Generator,
) -> Data:
    """Turn texts into token streams, documents and exchanges each in random order."""
    documents = [source.text + bundle.DOCUMENT_END for source in sources if source.text]
    turns = [
        bundle.as_turns(exchange.question, exchange.answer)
        + (bundle.DOCUMENT_END if rng.random() < NEW_CONVERSATION else "")
        for source in sources
        for exchange in source.exchanges
    ]
    raw, _ = _join(tokenizer, documents, rng)
    chat, starts = _join(tokenizer, turns, rng)
    return Data(Stream(raw), Stream(chat, starts), _encode_dialogues(tokenizer, written))


def _encode_dialogues(tokenizer: Tokenizer, written: Sequence[Dialogue]) -> Stream:
    """Concatenate conversations, of which only the answers are learned."""
    parts = [part for dialogue in written for part in bundle.as_parts(dialogue)]
    encoded = [item.ids for item in tokenizer.encode_batch([text for text, _ in parts])]
    weights = [
        np.full(len(ids), ANSWER_WEIGHT * is_answer, np.float32)
        for ids, (_, is_answer) in zip(encoded, parts, strict=True)
    ]
    ids = np.concatenate(encoded).astype(np.uint16)
    # Each conversation ends with this token, so the next one starts behind it.
    ends = np.flatnonzero(ids == bundle.SPECIALS.index(bundle.DOCUMENT_END)) + 1
    return Stream(ids, np.concatenate([[0], ends[:-1]]), np.concatenate(weights))


def _join(
    tokenizer: Tokenizer, texts: list[str], rng: np.random.Generator
) -> tuple[Ids, NDArray[np.int64]]:
    pieces = [item.ids for item in tokenizer.encode_batch(texts)]
    pieces = [pieces[index] for index in rng.permutation(len(pieces))]
    ends = np.cumsum([len(piece) for piece in pieces])
    return np.concatenate(pieces).astype(np.uint16), np.concatenate([[0], ends[:-1]])


@dataclass
class Clock:
    """Time budget of a training run."""

    seconds: float
    begun: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds since training began."""
        return time.monotonic() - self.begun

    @property
    def progress(self) -> float:
        """Elapsed share of the time budget, at most 1."""
        return min(self.elapsed / self.seconds, 1.0)


def learning_rate(progress: float, peak: float) -> float:
    """Return the learning rate: linear warm-up, then cosine decay to a small floor."""
    if progress < WARMUP:
        return peak * max(progress / WARMUP, 0.01)
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))
    return peak * (FLOOR + (1 - FLOOR) * cosine)


class Trainer:
    """Model, optimizer and compiled training step."""

    def __init__(self, seed: int, streams: int, resume: Path | None = None) -> None:
        """Start from ``seed``, or from a written model, and compile for ``streams`` threads."""
        mx.random.seed(seed)
        self.model = Model(bundle.architecture())
        if resume is not None:
            self.model.load_weights(str(resume / "model.safetensors"))
            self.round_to_half()
        self.optimizer = optim.AdamW(
            PEAK_RATE, betas=[0.9, 0.95], weight_decay=0.1, bias_correction=True
        )
        self.optimizer.init(self.model.trainable_parameters())
        self._state = [self.model.state, self.optimizer.state]
        mx.eval(self._state)
        loss = fast.make_loss([mx.new_stream(mx.default_device()) for _ in range(streams)])
        self._gradient: Callable[..., tuple[mx.array, Any]] = value_and_grad(self.model, loss)
        self._step = mx.compile(self._update, inputs=self._state, outputs=self._state)

    def _update(self, *batch: mx.array) -> mx.array:
        with fast.fast_layers():
            loss, gradient = self._gradient(self.model, *batch)
        gradient, _ = clip_gradient(gradient, CLIP)
        self.optimizer.update(self.model, gradient)
        return loss

    def step(self, batch: Batch, rate: float) -> float:
        """Take one optimizer step and return the batch's loss."""
        self.optimizer.learning_rate = mx.array(rate)
        loss: mx.array = self._step(*batch)
        mx.eval(loss, self._state)
        return _number(loss)

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Return the mean loss over ``batches``."""
        losses = [_number(fast.exact_loss(self.model, *batch)) for batch in batches]
        return sum(losses) / len(losses)

    def weights(self) -> dict[str, mx.array]:
        """Return the parameters by their safetensors names."""
        return dict(tree_flatten(self.model.parameters()))

    def round_to_half(self) -> None:
        """Round the weights to the values stored in the float16 file."""
        halves = tree_map(
            lambda value: value.astype(mx.float16).astype(mx.float32), self.model.parameters()
        )
        self.model.update(halves)


def _number(value: mx.array) -> float:
    return float(np.asarray(value))


def validation(stream: Stream) -> list[Batch]:
    """Draw the fixed windows that every report is measured on."""
    rng = np.random.default_rng(VALIDATION_SEED)
    per_batch = TOKENS_A_STEP // SHORT
    rows = [stream.window(rng, SHORT) for _ in range(VALIDATION_ROWS)]
    return [_as_batch(rows[at : at + per_batch]) for at in range(0, len(rows), per_batch)]


class Run:
    """One training run: draws batches, steps, reports and writes the model."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Read the corpus, learn the tokenizer and prepare the first step."""
        self.out: Path = options.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.rng = np.random.default_rng(options.seed)
        self.record: dict[str, Any] = {"python": platform.python_version(), "mlx": version("mlx")}
        self.record.update(
            seed=options.seed, minutes=options.minutes, peak=options.peak, windows=options.windows
        )
        self.record["reports"] = []
        if options.resume is not None:
            self.record["before"] = bundle.read_record(options.resume)
        self.windows: list[int] = options.windows
        self.peak: float = options.peak
        self._load(options.seed, options.resume)
        self.trainer = Trainer(options.seed, options.streams, options.resume)
        self.clock = Clock(options.minutes * 60)
        self.tokens = self.steps = 0
        self.recent: list[float] = []

    def _load(self, seed: int, resume: Path | None) -> None:
        sources = corpus.collect()
        kept = [source for source in sources if not source.held_out]
        held = [source for source in sources if source.held_out]
        tokenizer = (
            bundle.train_tokenizer(_texts(kept))
            if resume is None
            else bundle.read_tokenizer(resume)
        )
        bundle.write_tokenizer(self.out, tokenizer)
        written = dialogues(DIALOGUES, seed, held_out=False)
        self.data = encode(tokenizer, kept, written, self.rng)
        written = dialogues(HELD_OUT_DIALOGUES, VALIDATION_SEED, held_out=True)
        checks = encode(tokenizer, held, written, np.random.default_rng(VALIDATION_SEED))
        self.checks = {
            "raw": validation(checks.raw),
            "chat": validation(checks.chat),
            "dialogues": validation(checks.dialogues),
        }
        self.record["train"] = _describe(kept, self.data)
        self.record["validation"] = _describe(held, checks)
        log.info("corpus: %s; held out: %s", self.record["train"], self.record["validation"])

    def train(self) -> None:
        """Train until the time budget is used, then write and evaluate the final model."""
        self.record["start"] = self._losses()
        due = REPORT_SECONDS
        while self.clock.progress < 1:
            self._advance(self.clock.progress)
            if self.clock.elapsed >= due:
                self._report()
                due = self.clock.elapsed + REPORT_SECONDS
        self._report()
        self.trainer.round_to_half()
        self.record["float16_loss"] = self._losses()
        bundle.write_record(self.out, self.record)
        log.info("loss of the float16 file: %s", self.record["float16_loss"])

    def _advance(self, progress: float) -> None:
        batch = self.data.batch(self.rng, self.windows[progress >= LONG_AFTER])
        self.recent.append(self.trainer.step(batch, learning_rate(progress, self.peak)))
        self.tokens += TOKENS_A_STEP
        self.steps += 1

    def _losses(self) -> dict[str, float]:
        return {
            name: round(self.trainer.evaluate(batches), 4) for name, batches in self.checks.items()
        }

    def _report(self) -> None:
        bundle.write_weights(self.out, self.trainer.weights())
        train = round(sum(self.recent) / max(len(self.recent), 1), 4)
        seconds = round(self.clock.elapsed)
        entry = {"seconds": seconds, "steps": self.steps, "tokens": self.tokens, "train": train}
        self.record["reports"].append({**entry, **self._losses()})
        self.recent.clear()
        bundle.write_record(self.out, self.record)
        log.info("%s", self.record["reports"][-1])


def _texts(sources: Sequence[corpus.Source]) -> list[str]:
    texts = [source.text for source in sources]
    texts += [exchange.question for source in sources for exchange in source.exchanges]
    return texts


def _describe(sources: Sequence[corpus.Source], data: Data) -> dict[str, int]:
    return {
        "documents": sum(bool(source.text) for source in sources),
        "document_bytes": sum(len(source.text.encode()) for source in sources),
        "document_tokens": len(data.raw.ids),
        "exchanges": sum(len(source.exchanges) for source in sources),
        "exchange_tokens": len(data.chat.ids),
        "dialogues": len(data.dialogues.starts if data.dialogues.starts is not None else ()),
        "dialogue_tokens": len(data.dialogues.ids),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--minutes", type=float, default=60.0, help="time to train for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streams", type=int, default=2, help="slices computed at once: 1, 2, 4")
    parser.add_argument("--peak", type=float, default=PEAK_RATE, help="highest learning rate")
    parser.add_argument(
        "--windows",
        type=int,
        nargs=2,
        default=[SHORT, LONG],
        help="window lengths in tokens, early and late",
    )
    parser.add_argument("--resume", type=Path, help="directory of an earlier run to continue from")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    Run(options).train()


if __name__ == "__main__":
    main()
