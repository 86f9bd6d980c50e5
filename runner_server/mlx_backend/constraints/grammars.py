"""Compilation of constraints for the tokens of one model, and a cache of compiled ones."""

from __future__ import annotations

import importlib.util
import threading
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

from runner_common.extras import install_advice
from runner_server.engine.types import TOOL_CALLS, Constraint
from runner_server.errors import InvalidField
from runner_server.mlx_backend.constraints.matcher import GrammarMatcher, first_line
from runner_server.mlx_backend.constraints.problems import (
    lark_problem,
    plain_problem,
    schema_problem,
)
from runner_server.mlx_backend.constraints.reasoning import Markers, ReasonedGrammar
from runner_server.mlx_backend.constraints.sources import (
    field_of,
    grammar_text,
    read_schema,
    schema_grammar,
)
from runner_server.mlx_backend.constraints.tool_calls import calls_grammar, read_tools
from runner_server.mlx_backend.constraints.vocabulary import read_vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    from runner_server.chat.reasoning import Reasoning
    from runner_server.engine.backend import Grammar
    from runner_server.mlx_backend.tokenizer.codec import FastCodec

_MAX_CACHED = 64
_MAX_CACHED_BYTES = 1 << 20
"""Bounds of the cache: grammars, and bytes of their constraints."""

_THREADS = 2
"""Grammars compiled at once. Others wait, so that they do not take every core."""


class CompiledGrammar:
    """Implements ``runner_server.engine.backend.Grammar``.

    Args:
        start: A matcher at the beginning of a text, which is never advanced.
        tokenizer: The tokenizer of ``start``.
    """

    def __init__(self, start: LLMatcher, tokenizer: LLTokenizer) -> None:
        self._start = start
        self._tokenizer = tokenizer

    def start(self) -> GrammarMatcher:
        """Return a matcher; see ``Grammar.start``."""
        return GrammarMatcher(self._start, self._tokenizer)


class GrammarCache:
    """Implements ``runner_server.engine.backend.Grammars``.

    Args:
        codec: The model's tokenizer.
        vocab_size: Number of token ids that the output layer scores.
        end_ids: The ids that end a text.
    """

    def __init__(self, codec: FastCodec, vocab_size: int, end_ids: Collection[int]) -> None:
        self._codec = codec
        self._vocab_size = vocab_size
        self._end_ids = [id_ for id_ in end_ids if id_ < vocab_size]
        self._cached: OrderedDict[Constraint, Future[Grammar]] = OrderedDict()
        # Reentrant, because a future that has already failed calls back at once.
        self._lock = threading.RLock()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar")
        self._tokenizer: LLTokenizer | None = None
        self._markers_lock = threading.Lock()
        self._markers: dict[tuple[str, str, str], Markers] = {}

    @property
    def problem(self) -> str:
        """Why no constraint can be used; empty if constraints can."""
        if importlib.util.find_spec("llguidance") is None:
            return f"this server lacks the package llguidance: {install_advice('server')}"
        if not self._codec.knows_bytes:
            return "the model's tokenizer decodes tokens by their neighbours, not one by one"
        return "" if self._end_ids else "the model has no token that ends a text"

    def compile(self, constraint: Constraint) -> Future[Grammar]:
        """Begin to compile a constraint, unless it is cached; see ``Grammars.compile``."""
        with self._lock:
            future = self._cached.get(constraint)
            if future is None:
                future = self._threads.submit(self._compile, constraint)
                self._cached[constraint] = future
                future.add_done_callback(lambda done: self._forget_failed(constraint, done))
            else:
                self._cached.move_to_end(constraint)
            self._evict()
        return future

    def after_reasoning(self, reasoning: Reasoning, grammar: Grammar | None) -> Future[Grammar]:
        """Return the grammar of answers that may reason; see ``Grammars.after_reasoning``."""
        return self._threads.submit(self._reasoned, reasoning, grammar)

    def _reasoned(self, reasoning: Reasoning, grammar: Grammar | None) -> Grammar:
        field = "constraint" if grammar else "reasoning_budget"
        if problem := self.problem:
            raise InvalidField([(field, problem)])
        texts = reasoning.markers.think_start, reasoning.markers.think_end, reasoning.lead
        # A lock of its own: reading takes time, and the event loop waits for the other one.
        with self._markers_lock:
            if texts not in self._markers:
                try:
                    found = Markers.read(self._codec, self._vocab_size, self._end_ids, *texts)
                except ValueError as error:
                    raise InvalidField([(field, str(error))]) from None
                self._markers[texts] = found
            own = cast("CompiledGrammar | None", grammar)
            return ReasonedGrammar(self._markers[texts], self._codec, reasoning, own)

    def _forget_failed(self, constraint: Constraint, done: Future[Grammar]) -> None:
        if done.exception() is not None:
            with self._lock:
                self._cached.pop(constraint, None)

    def _evict(self) -> None:
        sizes = [sum(map(len, constraint.texts)) for constraint in self._cached]
        while len(sizes) > _MAX_CACHED or sum(sizes) > _MAX_CACHED_BYTES:
            sizes.pop(0)
            self._cached.popitem(last=False)

    def _compile(self, constraint: Constraint) -> Grammar:
        if problem := self.problem:
            raise InvalidField([("constraint", problem)])
        if constraint.kind == TOOL_CALLS:
            return self._compile_calls(constraint)
        text = grammar_text(constraint)
        tokenizer = self._require_tokenizer()
        matcher = _matcher(tokenizer, text)
        if matcher.is_error():
            problem = _problem(constraint, matcher.get_error(), tokenizer)
            raise InvalidField([(field_of(constraint), problem)])
        # Builds what the first masks of all texts share, and shows whether there is a text.
        matcher.compute_bitmask()
        if matcher.is_error():
            problem = f"no text can begin: {first_line(matcher.get_error())}"
            raise InvalidField([(field_of(constraint), problem)])
        return CompiledGrammar(matcher, tokenizer)

    def _compile_calls(self, constraint: Constraint) -> Grammar:
        tools = read_tools(constraint)
        tokenizer = self._require_tokenizer()
        matcher = _matcher(tokenizer, calls_grammar(constraint, tools, self._codec))
        matcher.compute_bitmask()
        if not matcher.is_error():
            return CompiledGrammar(matcher, tokenizer)

        def check(schema: Any) -> str:
            return _matcher(tokenizer, schema_grammar(schema)).get_error()

        # The grammar of all tools does not tell which schema is at fault.
        problem = plain_problem(matcher.get_error())
        errors = ((tool, error) for tool in tools if (error := check(tool.schema)))
        found = next(errors, None)
        if found is None:
            raise InvalidField([("tools", f"their calls cannot be constrained: {problem}")])
        tool, error = found
        raise InvalidField([(tool.field, schema_problem(tool.schema, error, check))])

    def _require_tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = read_vocabulary(self._codec, self._vocab_size, self._end_ids)
            return self._tokenizer


def _matcher(tokenizer: LLTokenizer, text: str) -> LLMatcher:
    """Return a matcher at the beginning of a text; its state says whether the grammar is sound."""
    import llguidance  # noqa: PLC0415 - the server works without it

    grammar = llguidance.LLMatcher.grammar_from_lark(text)
    return llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=_limits())


def _limits() -> LLParserLimits:
    """Return the limits of a grammar, in llguidance's units.

    Its defaults allow a step of 17 ms for each row, and 500 MB of lexer states.
    """
    import llguidance  # noqa: PLC0415 - the server works without it

    return llguidance.LLParserLimits(
        initial_lexer_fuel=1_000_000,  # 20 ms
        step_lexer_fuel=100_000,  # 7 ms
        step_max_items=20_000,  # 1 ms
        max_lexer_states=20_000,  # 40 MB
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def _problem(constraint: Constraint, error: str, tokenizer: LLTokenizer) -> str:
    if constraint.kind == "lark":
        return lark_problem(error)
    if constraint.kind != "json_schema":
        return plain_problem(error)

    def check(schema: Any) -> str:
        return _matcher(tokenizer, schema_grammar(schema)).get_error()

    return schema_problem(read_schema(constraint.texts[0]), error, check)
