"""The entry point of a generation, shared by the services of every protocol.

A service parses its request into a :class:`GenerationDraft`, enters :func:`generate`, and encodes
the deltas of the running request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from runner_server.api.constraints import start_matcher
from runner_server.api.prompts import Prompt, encode_prompt
from runner_server.api.violations import check_token_ids
from runner_server.chat.reasoning import Reasoning
from runner_server.engine.backend import ModelHandle
from runner_server.engine.engine import Engine
from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.types import CachePolicy, CompletionSpec, Constraint, ModelInfo, Sampling
from runner_server.errors import InvalidField, ModelUnsupported, PromptTooLong
from runner_server.telemetry.call_record import current_call

if TYPE_CHECKING:
    from runner_common.serving.statuses import CallContext


@dataclass(frozen=True)
class GenerationDraft:
    """A parsed and validated request with its defaults, whose prompt is not tokenized yet.

    Attributes:
        prompt: The prompt, not empty.
        max_tokens: Most tokens to generate; :meth:`fit` lowers it to the room in the context.
        sampling: Sampling options.
        stop: See :class:`CompletionSpec`.
        stop_token_ids: See :class:`CompletionSpec`.
        ignore_eos: See :class:`CompletionSpec`.
        request_id: The caller's name for the request; may be empty.
        priority: See :class:`CompletionSpec`.
        cache_policy: See :class:`CompletionSpec`.
        constraint: What the text must be; None for any text.
        adapter: Name of the adapter, one of the model's; empty for the model without one.
        reasoning: The reasoning before that text, and its limit; None if the text begins at once.
    """

    prompt: Prompt
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    request_id: str = ""
    priority: int = 0
    cache_policy: CachePolicy = field(default_factory=CachePolicy)
    constraint: Constraint | None = None
    adapter: str = ""
    reasoning: Reasoning | None = None

    def fit(self, prompt_ids: Sequence[int], model: ModelInfo) -> CompletionSpec:
        """Return the request for the engine, fitted to the model's context.

        Args:
            prompt_ids: The token ids of the prompt.
            model: The model that the request was validated for.

        Raises:
            InvalidField: The prompt has no tokens, or a token outside the model's vocabulary,
                which may be smaller than the tokenizer's.
            PromptTooLong: The prompt and one new token do not fit the context.
        """
        if not prompt_ids:
            raise InvalidField([(self.prompt.field, "the prompt has no tokens")])
        room = model.context_length - len(prompt_ids)
        if room < 1:
            raise PromptTooLong(len(prompt_ids), model.context_length)
        check_vocabulary(self.prompt, prompt_ids, model.vocab_size)
        return CompletionSpec(
            prompt_ids=tuple(prompt_ids),
            max_tokens=min(self.max_tokens, room),
            sampling=self.sampling,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            request_id=self.request_id,
            priority=self.priority,
            cache_policy=self._cache_policy(model),
            adapter=self.adapter,
        )

    def _cache_policy(self, model: ModelInfo) -> CachePolicy:
        """Return the use of the prefix cache, whose entries depend on the adapter."""
        policy = self.cache_policy
        for adapter in model.adapters:
            if adapter.name == self.adapter:
                policy = replace(policy, salt=adapter.cache_salt(policy.salt))
        return policy


def require_completes(model: ModelHandle) -> None:
    """Raise :class:`ModelUnsupported` for a model that only embeds texts."""
    if not model.info.completes:
        raise ModelUnsupported(
            f"the weight files in {model.info.path} have no output layer (lm_head), so the model "
            "completes no texts: it embeds them; use another model",
            model=model.info.path,
        )


def model_for_call(engine: Engine, request_id: str, name: str = "") -> ModelHandle:
    """Return the loaded model; record its name and the request's for telemetry.

    Args:
        engine: The engine with the model.
        request_id: The caller's name for the request; may be empty.
        name: The name of the model in the request; see :meth:`Engine.model`.

    Raises:
        ModelNotLoaded: No model is loaded, or another one.
        ShuttingDown: The engine is stopping, dead or draining.
    """
    record = current_call()
    record.request_id = request_id
    model = engine.model(name)
    record.model = model.info.name
    engine.refuse_when_draining()
    return model


@asynccontextmanager
async def generate(
    engine: Engine,
    model: ModelHandle,
    draft: GenerationDraft,
    context: CallContext,
) -> AsyncIterator[GenerationRequest]:
    """Submit a request for the duration of a context, and cancel it at exit unless finished.

    A context manager rather than an iterator of deltas, so that the service reads the output
    channel directly and no delta passes through another generator.

    Args:
        engine: The engine with the model.
        model: The model that the request was validated for.
        draft: The validated request.
        context: The call; its initial metadata is sent as soon as the request is queued.

    Raises:
        ModelUnsupported: The model only embeds texts.
        InvalidField: See :meth:`GenerationDraft.fit`; or the constraint cannot be used.
        PromptTooLong: The prompt does not fit into the model's context.
        RunnerFault: See :meth:`Engine.submit`.
    """
    require_completes(model)
    prompt_ids = await encode_prompt(draft.prompt, model)
    spec = draft.fit(prompt_ids, model.info)
    matcher = await start_matcher(draft.constraint, draft.reasoning, model)
    request = engine.submit(model, spec, matcher)
    current_call().stats = request.stats
    try:
        # Without headers, a proxy or a blocking client takes a queued stream for a dead one.
        await context.send_initial_metadata(())
        yield request
    finally:
        # Also reached when the client disconnects or its deadline passes.
        engine.cancel(request)


def check_vocabulary(prompt: Prompt, ids: Sequence[int], vocab_size: int) -> None:
    """Check tokens, of which there is at least one, against the model's vocabulary.

    Raises:
        InvalidField: A token is not in the vocabulary, which may be smaller than the tokenizer's.
    """
    if not isinstance(prompt.content, str):
        check_token_ids(prompt.field, ids, vocab_size)
    elif max(ids) >= vocab_size:
        text = f"the tokenizer produces token {max(ids)}, which the model does not have"
        raise InvalidField([(prompt.field, f"{text}: its ids are 0 to {vocab_size - 1}")])
