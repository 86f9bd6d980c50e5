"""Options, parts and results of completions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

from runner_client.checks import (
    check_bias,
    check_flag,
    check_ids,
    check_integer,
    check_number,
    check_texts,
)
from runner_client.types.schemas import value_of

if TYPE_CHECKING:
    import builtins
    from collections.abc import Mapping

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Sampling and stop options of a completion. None selects the server's default.

    Raises:
        TypeError: A value is of a wrong type. The server checks the ranges.
    """

    temperature: float | None = None
    """Sampling temperature; 0 always takes the most likely token. 0 to 100; default 0.8."""
    top_p: float | None = None
    """Sample from the most likely tokens that together have this probability. Above 0 to 1; 1 is
    off; default 0.9."""
    min_p: float | None = None
    """Drop tokens less likely than this fraction of the most likely one. 0 to 1; 0 is off;
    default 0."""
    top_k: int | None = None
    """Sample from this many most likely tokens. 0 to the size of the vocabulary; 0 is off;
    default 40."""
    repeat_last_n: int | None = None
    """How many of the last tokens, prompt and generated, the penalties consider; -1 is all, 0 is
    none; default 64."""
    repeat_penalty: float | None = None
    """Factor that divides positive and multiplies negative logits of repeated tokens. 0.01 to 100;
    1 is off; default 1."""
    presence_penalty: float | None = None
    """Value subtracted once from the logits of repeated tokens. -100 to 100; default 0."""
    frequency_penalty: float | None = None
    """Value subtracted from the logits of repeated tokens for each occurrence. -100 to 100;
    default 0."""
    num_predict: int | None = None
    """The maximum number of tokens to generate; default: up to the end of the context."""
    seed: int | None = None
    """Seed of the random numbers: equal seeds, prompts and options give equal texts; default:
    random."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; the text stops before the first match."""
    logit_bias: Mapping[int, float] | None = None
    """Values added to the logits, by token id."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the text and add nothing to it, like the model's own end tokens."""
    ignore_eos: bool = False
    """Whether the text goes on after the model's own end tokens, whose text it then contains."""
    min_predict: int = 0
    """The number of first tokens that do not end the text: no end token is drawn there, and stop
    strings are looked for in the text of later tokens only. 0 to ``num_predict``."""
    penalize_output_only: bool = False
    """Whether the presence and frequency penalties consider all generated tokens and none of the
    prompt, as in OpenAI's API; ``repeat_last_n`` then concerns ``repeat_penalty`` only."""

    def __post_init__(self) -> None:
        for name in _INTEGERS:
            check_integer(name, getattr(self, name))
        for name in _NUMBERS:
            check_number(name, getattr(self, name))
        check_texts("stop", self.stop)
        check_bias("logit_bias", self.logit_bias)
        check_ids("stop_token_ids", self.stop_token_ids)
        check_flag("ignore_eos", self.ignore_eos)
        check_flag("penalize_output_only", self.penalize_output_only)


_INTEGERS = ("top_k", "repeat_last_n", "num_predict", "min_predict", "seed")
_NUMBERS = (
    *("temperature", "top_p", "min_p"),
    *("repeat_penalty", "presence_penalty", "frequency_penalty"),
)


class DoneReason(StrEnum):
    """Reason for the end of a completion."""

    UNKNOWN = "unknown"
    """A reason unknown to this version."""
    STOP = "stop"
    """The model ended the text, a stop token was generated, or a stop string matched."""
    LENGTH = "length"
    """``num_predict`` tokens were generated, or the context is full."""
    TOOL_CALLS = "tool_calls"
    """The model ended its answer to a conversation with a call of a tool."""


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """Progress of a completion's prefill."""

    evaluated_count: int
    """Tokens of the prompt prefilled so far."""
    total_count: int
    """Tokens of the prompt."""


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the most likely tokens at a position, or a requested one."""

    token_id: int
    """Token id."""
    text: str
    """Text that the token would have added, as in ``TokenLogprob.text``."""
    logprob: float
    """Natural logarithm of the probability; at most 0."""
    bytes: builtins.bytes = b""
    """The token's bytes; may hold part of a character."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, generated or of the prompt, and its log probability before sampling options."""

    token_id: int
    """Token id."""
    text: str
    """Text that the token adds. The texts of all entries joined are the content, then the matched
    stop string and the rest of its last token. Whole characters only: a character spread over
    several tokens belongs to the one that completes it. Empty for a token that ends the text."""
    logprob: float
    """Natural logarithm of the probability; at most 0."""
    top: tuple[TopLogprob, ...]
    """The most likely tokens at this position, most likely first."""
    bytes: builtins.bytes = b""
    """The token's bytes, which may hold part of a character. The bytes of all entries joined are
    the UTF-8 text that follows the prompt. Empty for a token that ends the text."""
    candidates: tuple[TopLogprob, ...] = ()
    """The tokens of ``logprob_token_ids``, in that order."""


@dataclass(frozen=True, slots=True)
class CompletionChunk:
    """Part of a streamed completion. Counts and durations are set in the last chunk only."""

    content: str = ""
    """The next part of the text, whole characters only."""
    token_ids: tuple[int, ...] = ()
    """Tokens generated since the previous chunk; their text may follow in the next one."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One entry for each of ``token_ids``, if requested."""
    done: bool = False
    """True in the last chunk only."""
    done_reason: DoneReason | None = None
    """Why the completion ended; None before the last chunk."""
    stop_match: str | None = None
    """The stop string that ended the text, if any."""
    prompt_progress: PromptProgress | None = None
    """Progress of the prefill; None once the prefill is complete."""
    prompt_eval_count: int = 0
    """Tokens of the prompt."""
    prompt_eval_seconds: float = 0.0
    """Time from the start of the prefill to the first token."""
    eval_count: int = 0
    """Generated tokens."""
    eval_seconds: float = 0.0
    """Time from the first token to the last."""
    queue_seconds: float = 0.0
    """Time that the request waited in the queue."""
    prompt_cached_count: int = 0
    """The part of ``prompt_eval_count`` taken from the prefix cache."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """The next tokens of the prompt, from the second one on, if requested."""
    constraint_satisfied: bool | None = None
    """Whether the whole text is what the constraint asks for; False if it was cut short before it
    was complete; None without a constraint."""
    drafted_count: int = 0
    """Tokens drafted for a text that repeats itself, each step checking several."""
    draft_accepted_count: int = 0
    """The part of ``eval_count`` that was drafted."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished completion: the joined chunks of a stream."""

    content: str
    """The whole text."""
    token_ids: tuple[int, ...]
    """All generated tokens, including the one that ended the text."""
    logprobs: tuple[TokenLogprob, ...]
    """One entry for each of ``token_ids``, if requested."""
    done_reason: DoneReason
    """Why the completion ended."""
    stop_match: str | None
    """The stop string that ended the text, if any."""
    prompt_eval_count: int
    """Tokens of the prompt."""
    prompt_eval_seconds: float
    """Time from the start of the prefill to the first token."""
    eval_count: int
    """Generated tokens."""
    eval_seconds: float
    """Time from the first token to the last."""
    queue_seconds: float
    """Time that the request waited in the queue."""
    prompt_cached_count: int = 0
    """The part of ``prompt_eval_count`` taken from the prefix cache."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """The tokens of the prompt from the second one on, if requested. Their texts joined are the
    text of the prompt behind its first token."""
    constraint_satisfied: bool | None = None
    """Whether the whole text is what the constraint asks for; False if it was cut short before it
    was complete; None without a constraint."""
    drafted_count: int = 0
    """Tokens drafted for a text that repeats itself, each step checking several."""
    draft_accepted_count: int = 0
    """The part of ``eval_count`` that was drafted."""

    def parse(self, kind: type[T]) -> T:
        """Return the text as a value of the type that was its ``JsonSchema``.

        Raises:
            ValueError: The text is unfinished or not such a value; in the latter case a
                ``pydantic.ValidationError``.
            TypeError: Pydantic does not know the type.
            NotSupportedError: Pydantic is not installed.
        """
        is_cut = self.done_reason is DoneReason.LENGTH or self.stop_match is not None
        # Of all JSON values, only the beginning of a number is one too.
        if self.constraint_satisfied is False or (is_cut and self.content[-1:].isdigit()):
            end = (
                f"the stop string {self.stop_match!r} ended it"
                if self.stop_match is not None
                else "raise num_predict, or load the model with more context"
            )
            raise ValueError(
                f"the text is unfinished after {self.eval_count:,} tokens and is not parsed: {end}"
            )
        return value_of(kind, self.content)
