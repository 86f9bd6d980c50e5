"""A fake model library in plain Python, for tests to observe, pause and break."""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from runner_server.chat.format import CONTENT, REASONING, AnswerFormat, ChatFormat
from runner_server.chat.reasoning import Reasoning
from runner_server.engine.adapters import AdapterInfo
from runner_server.engine.backend import Codec, Grammar, Matcher
from runner_server.engine.embedding.types import Embedded, EmbeddingInfo
from runner_server.engine.logprobs import PromptLogprobs, TokenLogprob
from runner_server.engine.prefill_queue import PrefillLimits
from runner_server.engine.prefix_cache import Match
from runner_server.engine.types import (
    CachePolicy,
    Constraint,
    LoadSpec,
    MemoryCounters,
    ModelInfo,
    NotFinite,
    Sampling,
    Token,
)
from runner_server.engine.work import DecodeItem, EmbedItem, PrefillItem, WorkItem, WorkReport

EOS = 256
BOS = 257
VOCAB_SIZE = 512
CONTEXT_LENGTH = 4096
PREFILL_CHUNK = 8
ITEM_SECONDS = 0.01
"""Time that a work item claims to take: three chunks fill a slice between decode steps."""

WEIGHT_BYTES = 1 << 20
ROW_BYTES = 1 << 10
TOKEN_BYTES = 100
DEADLINE_SECONDS = 20.0
"""Time limit for any wait in a test; only a bug reaches it."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
)

_LETTERS = b"abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789."


class Gate:
    """Gate at which a thread waits for a permit from the test; open at first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._permits: int | None = None
        self._waiting = 0
        self._passed = 0

    def shut(self) -> None:
        """Require a permit for every arrival."""
        with self._changed:
            self._permits = 0

    def allow(self, count: int = 1) -> None:
        """Let ``count`` arrivals pass."""
        with self._changed:
            self._permits = (self._permits or 0) + count
            self._changed.notify_all()

    def open(self) -> None:
        """Let every arrival pass without a permit."""
        with self._changed:
            self._permits = None
            self._changed.notify_all()

    def pass_through(self) -> None:
        """Wait for a permit; called by the watched thread."""
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            free = self._changed.wait_for(lambda: self._permits != 0, DEADLINE_SECONDS)
            self._waiting -= 1
            self._passed += 1
            if self._permits:
                self._permits -= 1
            self._changed.notify_all()
        assert free, "nobody opened the gate"

    def wait_arrival(self) -> None:
        """Wait until a thread is blocked at the shut gate."""
        with self._changed:
            stands = self._changed.wait_for(
                lambda: self._waiting > 0 and self._permits == 0, DEADLINE_SECONDS
            )
        assert stands, "nobody came to the gate"

    def wait_passed(self, count: int) -> None:
        """Wait until ``count`` arrivals have passed in total."""
        with self._changed:
            done = self._changed.wait_for(lambda: self._passed >= count, DEADLINE_SECONDS)
        assert done, f"only {self._passed} of {count} have passed"


class MarkedBytes:
    """Marked codec of ``ByteCodec``, whose texts have no special tokens."""

    def mark(self, texts: Sequence[str], _mark: str) -> list[str]:
        """See ``MarkedCodec.mark``."""
        return list(texts)

    def encode(self, text: str, mark: str) -> list[int]:
        """See ``MarkedCodec.encode``."""
        return list(text.replace(mark, "").encode())


class ByteCodec:
    """Codec with one id per UTF-8 byte; ids above 255 are special and have no text."""

    def encode(self, text: str, *, as_prompt: bool, literal: bool = False) -> list[int]:  # noqa: ARG002 - has no special tokens
        """See ``Codec.encode``: a prompt begins with ``BOS``."""
        return [BOS] * as_prompt + list(text.encode())

    def marked(self, _template: str) -> MarkedBytes:
        """See ``Codec.marked``."""
        return MarkedBytes()

    def encode_whole(self, text: str, *, literal: bool = False) -> list[int]:  # noqa: ARG002 - as above
        """See ``Codec.encode_whole``: a text is between ``BOS`` and ``EOS``."""
        return [BOS, *text.encode(), EOS]

    def fewest_tokens(self, _text: str, _enough: int, *, literal: bool = False) -> int:  # noqa: ARG002 - as above
        """See ``Codec.fewest_tokens``: always 0, since encoding is cheap."""
        return 0

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Codec.decode``."""
        return bytes(id_ for id_ in ids if id_ < 256).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """See ``Codec.token_bytes``."""
        return bytes([token_id]) if token_id < 256 else b""


def chat_format(template: str, **fields: Any) -> ChatFormat:
    """Return the chat format of a model with one template."""
    return ChatFormat(templates={"default": template}, **fields)


THINKING = AnswerFormat(
    {CONTENT: (("<think>", REASONING),), REASONING: (("</think>", CONTENT),)}, CONTENT, "<think>"
)
"""The answer format of a model with the usual markers of reasoning."""

Reply = Callable[[Sequence[int], Sampling], Iterator[int]]


def endless(prompt_ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
    """Yield letters derived from prompt, seed and position, without end."""
    state = hashlib.sha256(repr((list(prompt_ids), sampling.seed)).encode()).digest()
    position = 0
    while True:
        digest = hashlib.sha256(state + position.to_bytes(8)).digest()
        yield from (_LETTERS[byte % len(_LETTERS)] for byte in digest)
        position += 1


def says(text: str | bytes) -> Reply:
    """Return a reply which generates ``text`` and then the end-of-text token."""
    data = text.encode() if isinstance(text, str) else text
    return lambda _ids, _sampling: iter([*data, EOS])


@dataclass
class _Row:
    tokens: Iterator[int]
    sampling: Sampling
    left: list[int]
    """The prompt without the tokens prefilled."""


class FakeExecutor:
    """Executor whose rows generate the backend's reply, one token in every decode step."""

    def __init__(self, backend: FakeBackend) -> None:
        self._backend = backend
        self.rows: dict[int, _Row] = {}
        self.texts: dict[int, Sequence[Sequence[int]]] = {}
        self.decoding: list[int] = []
        self.closed = False

    def add(
        self,
        row: int,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        cache_policy: CachePolicy,
        matcher: Matcher | None = None,
        adapter: str = "",
    ) -> None:
        """See ``Executor.add``."""
        assert prompt_ids, "an empty prompt must not get here"
        if cache_policy != CachePolicy():
            self._backend.policies.append(cache_policy)
        self._backend.matchers.append(matcher)
        self._backend.adapters.append(adapter)
        assert row not in self.rows
        reply = self._backend.reply(prompt_ids, sampling)
        self.rows[row] = _Row(reply, sampling, [*prompt_ids])

    def add_texts(self, row: int, texts: Sequence[Sequence[int]]) -> None:
        """See ``Executor.add_texts``."""
        self.texts[row] = texts

    def find_prefix(self, _prompt_ids: Sequence[int], _salt: str) -> Match:
        """See ``Executor.find_prefix``: no prompt is cached."""
        return Match(0, 0)

    def find_on_disk(self, _prompt_ids: Sequence[int], _salt: str) -> int:
        """See ``Executor.find_on_disk``: nothing is on disk."""
        return 0

    def run(self, item: WorkItem) -> WorkReport:
        """See ``Executor.run``; an item takes ``ITEM_SECONDS``."""
        assert not self.closed
        self._backend.step_gate.pass_through()
        self._backend.steps += 1
        if self._backend.failures:
            raise self._backend.failures.pop(0)
        if isinstance(item, PrefillItem):
            found = [self._prefill(self.rows[chunk.row], chunk.count) for chunk in item.chunks]
            return WorkReport(ITEM_SECONDS, prompt_logprobs=found[0])
        if isinstance(item, EmbedItem):
            return WorkReport(ITEM_SECONDS, events=tuple(self._vectors(item)))
        assert isinstance(item, DecodeItem)
        self.decoding += item.joining
        assert self.decoding, "a step without rows"
        return WorkReport(ITEM_SECONDS, events=tuple(map(self._next_token, self.decoding)))

    def preempt(self, row: int) -> None:
        """See ``Executor.preempt``."""
        self.decoding.remove(row)
        self._backend.preemptions += 1

    def remove(self, rows: Collection[int]) -> None:
        """See ``Executor.remove``."""
        if self._backend.remove_failures:
            raise self._backend.remove_failures.pop(0)
        for row in rows:
            if self.texts.pop(row, None) is not None:
                continue
            del self.rows[row]
            if row in self.decoding:
                self.decoding.remove(row)

    def close(self) -> None:
        """See ``Executor.close``."""
        self.rows.clear()
        self.texts.clear()
        self.closed = True

    def _vectors(self, item: EmbedItem) -> Iterator[Embedded | NotFinite]:
        """Yield a vector for each text that ends: the number and the sum of its tokens."""
        self._backend.embedded.append(item)
        for chunk in item.chunks:
            ids = self.texts[chunk.row][chunk.text]
            if self._backend.broken_token in ids:
                yield NotFinite(chunk.row)
            elif chunk.is_last:
                vector = array("f", [len(ids), sum(ids)])
                yield Embedded(chunk.row, chunk.text, vector)

    def _prefill(self, row: _Row, count: int) -> PromptLogprobs | None:
        """Advance a prompt; the log probability of a token is minus an eighth of its id."""
        following, row.left = row.left[1 : count + 1], row.left[count:]
        top = row.sampling.prompt_logprobs
        if top is None or not count:
            return None
        return PromptLogprobs(
            array("i", following),
            array("f", [-id_ / 8 for id_ in following]),
            array("i", [*range(top)] * len(following)),
            array("f", [-1.0 - i for i in range(top)] * len(following)),
        )

    def _next_token(self, id_: int) -> Token:
        row = self.rows[id_]
        token = next(row.tokens)
        logprob = None
        if row.sampling.logprobs is not None:
            top = tuple((i, -1.0 - i) for i in range(row.sampling.logprobs))
            candidates = tuple((i, -0.25 * i) for i in row.sampling.logprob_token_ids)
            logprob = TokenLogprob(token, -0.5, top, candidates=candidates)
        return Token(id_, token, logprob)


class FakeGrammar:
    """Grammar of every text but ``bad``, which is also the matcher of every text."""

    is_satisfied = True

    def start(self) -> FakeGrammar:
        """See ``Grammar.start``."""
        return self

    def accepts(self, text: str) -> bool:
        """See ``Matcher.accepts``."""
        return text != "bad"


@dataclass
class FakeGrammars:
    """Grammars with immediate compilation of any constraint.

    Attributes:
        compiled: Every constraint, in the order they came.
        reasoned: The arguments of every call of ``after_reasoning``.
        failure: Fails every compilation.
    """

    compiled: list[Constraint] = field(default_factory=list)
    reasoned: list[tuple[Reasoning, Grammar | None]] = field(default_factory=list)
    failure: Exception | None = None

    def compile(self, constraint: Constraint) -> Future[Grammar]:
        """See ``Grammars.compile``."""
        self.compiled.append(constraint)
        future: Future[Grammar] = Future()
        if self.failure:
            future.set_exception(self.failure)
        else:
            future.set_result(FakeGrammar())
        return future

    def after_reasoning(self, reasoning: Reasoning, grammar: Grammar | None) -> Future[Grammar]:
        """See ``Grammars.after_reasoning``."""
        self.reasoned.append((reasoning, grammar))
        future: Future[Grammar] = Future()
        future.set_result(FakeGrammar())
        return future


class FakeModel:
    """Model without weights, consisting of a description."""

    def __init__(self, backend: FakeBackend, info: ModelInfo) -> None:
        self._backend = backend
        self.info = info
        self.codec = backend.codec
        self.grammars = backend.grammars

    def kv_bytes(self, tokens: int) -> int:
        """See ``LoadedModel.kv_bytes``."""
        return tokens * TOKEN_BYTES

    def limit_prefix_cache(self, limit_bytes: int) -> None:
        """See ``LoadedModel.limit_prefix_cache``."""
        self._backend.prefix_cache_limits.append(limit_bytes)

    def save_prefixes(self, *, is_idle: bool) -> bool:  # noqa: ARG002 - nothing is on disk
        """See ``LoadedModel.save_prefixes``."""
        return False

    def close(self) -> None:
        """See ``LoadedModel.close``."""

    @property
    def max_draft(self) -> int:
        """See ``LoadedModel.max_draft``: drafts are not checked."""
        return 0

    @property
    def prefill_limits(self) -> PrefillLimits:
        """See ``LoadedModel.prefill_limits``: prompts run alone, in chunks of ``PREFILL_CHUNK``."""
        return PrefillLimits(max_chunk=PREFILL_CHUNK, max_tokens=PREFILL_CHUNK)

    def new_executor(self) -> FakeExecutor:
        """See ``LoadedModel.new_executor``."""
        executor = FakeExecutor(self._backend)
        self._backend.executors.append(executor)
        return executor


@dataclass
class FakeBackend:
    """Fake implementation of ``runner_server.engine.backend.Backend``.

    Attributes:
        reply: Produces the tokens that a row generates.
        failures: Raised by the next work items, one per item.
        remove_failures: Raised by the next removals of rows, one per call.
        kv_budget_bytes: KV budget of loaded models; a token takes ``TOKEN_BYTES``.
        codec: Tokenizer of loaded models.
        chat: Chat format of loaded models.
        grammars: Compiler of constraints of loaded models.
        load_error: Raised once by the next load, at 40 % progress.
        check_error: Raised once by the next ``check``.
        open_error: Raised by ``open``.
        step_gate: Passed by every work item.
        check_gate: Passed by every ``check``.
        load_gate: Passed by a load before each of its six progress reports.
        steps: Number of work items begun.
        preemptions: Number of times a row was preempted.
        executors: Every executor made until now.
        calls: Names of the calls, each with the name of the calling thread.
        prefix_cache_limits: Byte limits of the prefix cache, in the order they were set.
        policies: The use of the prefix cache by rows with a policy of their own, in the order the
            rows were added.
        matchers: The matcher of every row, in that order.
        adapters: The adapter of every row, in that order.
        weight_bytes: Weights held now.
        embeds: Whether loaded models embed texts.
        completes: Whether loaded models complete texts.
        embedded: Every work item with texts.
        broken_token: Token of texts whose vectors are not finite.
    """

    reply: Reply = endless
    failures: list[Exception] = field(default_factory=list)
    remove_failures: list[Exception] = field(default_factory=list)
    kv_budget_bytes: int = 1 << 30
    codec: Codec = field(default_factory=ByteCodec)
    chat: ChatFormat = field(default_factory=lambda: chat_format(CHAT_TEMPLATE))
    grammars: FakeGrammars = field(default_factory=FakeGrammars)
    load_error: Exception | None = None
    check_error: Exception | None = None
    open_error: Exception | None = None
    step_gate: Gate = field(default_factory=Gate)
    check_gate: Gate = field(default_factory=Gate)
    load_gate: Gate = field(default_factory=Gate)
    steps: int = 0
    preemptions: int = 0
    executors: list[FakeExecutor] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)
    prefix_cache_limits: list[int] = field(default_factory=list)
    policies: list[CachePolicy] = field(default_factory=list)
    matchers: list[Matcher | None] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)
    weight_bytes: int = 0
    embeds: bool = True
    completes: bool = True
    embedded: list[EmbedItem] = field(default_factory=list)
    broken_token: int = VOCAB_SIZE

    def open(self) -> str:
        """See ``Backend.open``."""
        self._note("open")
        if self.open_error:
            raise self.open_error
        return "cpu: fake"

    def check(self, spec: LoadSpec) -> None:  # noqa: ARG002 - it takes any
        """See ``Backend.check``."""
        self.check_gate.pass_through()
        if self.check_error:
            error, self.check_error = self.check_error, None
            raise error

    def load(self, spec: LoadSpec, report: Callable[[int], None]) -> FakeModel:
        """See ``Backend.load``."""
        self._note("load")
        for progress in range(0, 101, 20):
            self.load_gate.pass_through()
            report(progress)
            self.weight_bytes = WEIGHT_BYTES * progress // 100
            if self.load_error and progress >= 40:
                error, self.load_error = self.load_error, None
                raise error
        info = replace(
            model_info(spec),
            kv_budget_bytes=self.kv_budget_bytes,
            chat=self.chat,
            completes=self.completes,
            adapters=tuple(
                AdapterInfo(each.name, each.path, f"digest of {each.path}")
                for each in spec.adapters
            ),
        )
        if self.embeds:
            info = replace(info, embedding=EmbeddingInfo(2, info.context_length, problem=""))
        return FakeModel(self, info)

    def memory(self) -> MemoryCounters:
        """See ``Backend.memory``."""
        rows = sum(len(executor.rows) for executor in self.executors)
        return MemoryCounters(self.weight_bytes + rows * ROW_BYTES, 0, WEIGHT_BYTES)

    def release(self, *, for_next: bool = False) -> None:  # noqa: ARG002 - nothing is set aside
        """See ``Backend.release``."""
        self._note("release")
        self.weight_bytes = 0

    def trim(self) -> None:
        """See ``Backend.trim``."""
        self._note("trim")

    def close(self) -> None:
        """See ``Backend.close``."""
        self._note("close")

    def open_gates(self) -> None:
        """Let every thread continue."""
        self.step_gate.open()
        self.load_gate.open()

    def _note(self, name: str) -> None:
        self.calls.append((name, threading.current_thread().name))


_INFO = ModelInfo(
    name="fake",
    path="/models/fake",
    architecture="fake",
    max_context_length=CONTEXT_LENGTH,
    vocab_size=VOCAB_SIZE,
    weight_bytes=WEIGHT_BYTES,
    dtype="float32",
    quantization_bits=0,
    eos_token_ids=frozenset({EOS}),
    context_length=CONTEXT_LENGTH,
    parallel=4,
    limit_bytes=1 << 30,
    takes_constraints=True,
)


def model_info(spec: LoadSpec | None = None) -> ModelInfo:
    """Return the description of the model loaded for ``spec``."""
    if spec is None:
        return _INFO
    return replace(
        _INFO,
        name=spec.model,
        context_length=spec.context_length or CONTEXT_LENGTH,
        parallel=spec.parallel,
        prefix_cache_bytes=spec.prefix_cache_bytes or 0,
    )
