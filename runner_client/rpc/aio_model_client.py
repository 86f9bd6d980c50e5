"""Calls of an asyncio client that use the loaded model."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from runner_client.checks import check_number, check_text
from runner_client.errors import ModelUnsupportedError
from runner_client.rpc.aio_chat_client import AsyncChatClient
from runner_client.rpc.messages import requests, responses
from runner_client.rpc.messages.embeddings import embed_request, embeddings, not_supported
from runner_client.rpc.transport import health
from runner_client.rpc.transport.base import LOAD_SECONDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runner_client.rpc.aio_stream import AsyncCompletionStream, AsyncStatusStream
    from runner_client.types import Completion, Constraint, Embedding, Options, Status


class AsyncModelClient(AsyncChatClient):
    """Base of ``AsyncRunnerClient``: the calls open to the token for use."""

    async def status(
        self, *, timeout_seconds: float | None = None, model: str | None = None
    ) -> Status:
        """Return the runner's current state, model and memory. Works during a load, too.

        Args:
            timeout_seconds: The deadline of this call. Default: ``Timeouts.call_seconds``.
            model: See ``completion``.

        Raises:
            ModelNotLoadedError: ``model`` is not the loaded model.
            RunnerError: The call failed for another reason.
        """
        check_number("timeout_seconds", timeout_seconds)
        request = requests.status_request(model)
        reply = await self._connection.call(self._connection.stub.Status, request, timeout_seconds)
        status = responses.status(reply)
        self._connection.note_status(status)
        return status

    def watch_status(
        self, *, interval_seconds: float | None = None, model: str | None = None
    ) -> AsyncStatusStream:
        """Watch the runner: return a stream of statuses, the first at once, without waiting.

        Another status follows each change of state, progress, counts, model or last error, at most
        20 a second. Reading raises ``RunnerTimeoutError`` without a first status in
        ``Timeouts.call_seconds``, or without another one in that time after each interval.

        Args:
            interval_seconds: The longest time between two statuses, 0.1 to 3,600, to notice a
                runner that hangs. Default: a status after changes only.
            model: The model that must be loaded when the call begins. Default: any, or none.

        Raises:
            TypeError: An argument is of the wrong type.
            InvalidRequestError: The interval is out of range.
            RunnerUnavailableError: The client is closed. Reading raises all other errors.
        """
        request = requests.watch_request(interval_seconds, model)
        return self._connection.start_watch(request, interval_seconds)

    async def ping(self) -> float:
        """Request a status and return the round-trip time, in seconds.

        Raises:
            RunnerError: The call failed.
        """
        begin = time.monotonic()
        await self.status()
        return time.monotonic() - begin

    async def is_serving(self, service: str = "") -> bool:
        """Return whether ``grpc.health.v1`` reports SERVING, which does not require a model.

        Args:
            service: A full service name; "" is the whole server.

        Raises:
            RunnerError: The call failed, or the service is unknown.
        """
        check_text("service", service)
        return health.is_serving(
            await self._connection.call(self._connection.health, health.request(service))
        )

    def completion(
        self,
        prompt: str | Sequence[int],
        *,
        options: Options | None = None,
        logprobs: int | None = None,
        request_id: str = "",
        priority: int = 0,
        model: str | None = None,
        bypass_prefix_cache: bool = False,
        cache_salt: str = "",
        literal: bool = False,
        logprob_token_ids: Sequence[int] = (),
        prompt_logprobs: int | None = None,
        constraint: Constraint | None = None,
        adapter: str = "",
    ) -> AsyncCompletionStream:
        """Start a completion and return the stream of chunks without waiting.

        Reading raises ``RunnerTimeoutError`` after ``Timeouts.first_token_seconds`` without a
        token, or ``Timeouts.idle_seconds`` without any message.

        Args:
            prompt: Text, or token ids, which are used unchanged.
            options: Sampling and stop options.
            logprobs: The number of most likely tokens, 0 to 20, to report with the log
                probability of each token. Default: no log probabilities.
            request_id: A name for the request in the server's log, and for ``abort``.
            priority: Higher first among waiting completions, -100 to 100. Each second of waiting
                counts like one level.
            model: The model that is meant, by the name it was loaded with or its path; another
                one is refused. Default: the loaded model.
            bypass_prefix_cache: Whether the prompt takes nothing from the prefix cache, and
                nothing of the completion is kept there.
            cache_salt: Only completions with the same salt, at most 128 characters, share entries
                of the prefix cache.
            literal: Whether the special tokens written in the text are text.
            logprob_token_ids: Tokens to report with the log probability of each token, at most 128.
            prompt_logprobs: The number of most likely tokens, 0 to 20, to report with the log
                probability of each token of the prompt, which then takes nothing from the prefix
                cache. Default: no log probabilities of the prompt.
            constraint: What the text must be: a ``JsonSchema``, ``JsonObject``, ``Regex``,
                ``LarkGrammar`` or ``Choice``. Default: any text.
            adapter: The adapter, by its name in ``LoadOptions.adapters``. Default: the model
                without one.

        Raises:
            TypeError: An argument is of the wrong type.
            InvalidRequestError: An argument cannot be sent.
            RunnerUnavailableError: The client is closed. Reading raises all other errors.
        """
        request = requests.completion_request(
            prompt,
            options=options,
            logprobs=logprobs,
            request_id=request_id,
            priority=priority,
            model=model,
            bypass_prefix_cache=bypass_prefix_cache,
            cache_salt=cache_salt,
            literal=literal,
            logprob_token_ids=logprob_token_ids,
            prompt_logprobs=prompt_logprobs,
            constraint=constraint,
            adapter=adapter,
        )
        return self._connection.start_stream(request)

    async def complete(
        self,
        prompt: str | Sequence[int],
        *,
        options: Options | None = None,
        logprobs: int | None = None,
        request_id: str = "",
        priority: int = 0,
        model: str | None = None,
        bypass_prefix_cache: bool = False,
        cache_salt: str = "",
        literal: bool = False,
        logprob_token_ids: Sequence[int] = (),
        prompt_logprobs: int | None = None,
        constraint: Constraint | None = None,
        adapter: str = "",
    ) -> Completion:
        """Run a completion to the end, with the arguments and timeouts of ``completion``.

        Raises:
            TypeError: An argument is of the wrong type.
            InvalidRequestError: An argument is out of range, or the constraint cannot be used.
            PromptTooLongError: The prompt does not fit the context.
            ModelNotLoadedError: No model is loaded, or another one than ``model``.
            QueueFullError: Too many requests are waiting.
            RunnerTimeoutError: No token, or no message, arrived in time.
            RunnerError: The completion failed for another reason.
        """
        stream = self.completion(
            prompt,
            options=options,
            logprobs=logprobs,
            request_id=request_id,
            priority=priority,
            model=model,
            bypass_prefix_cache=bypass_prefix_cache,
            cache_salt=cache_salt,
            literal=literal,
            logprob_token_ids=logprob_token_ids,
            prompt_logprobs=prompt_logprobs,
            constraint=constraint,
            adapter=adapter,
        )
        async with stream:
            return responses.join_chunks([chunk async for chunk in stream])

    async def tokenize(
        self,
        content: str,
        *,
        add_special_tokens: bool = False,
        model: str | None = None,
        literal: bool = False,
    ) -> list[int]:
        """Split text into the model's token ids.

        Args:
            content: The text.
            add_special_tokens: Whether to add the special tokens that a completion's prompt gets.
            model: See ``completion``.
            literal: See ``completion``.

        Raises:
            ModelNotLoadedError: No model is loaded, or another one than ``model``.
            RunnerError: The call failed for another reason.
        """
        request = requests.tokenize_request(
            content, add_special_tokens=add_special_tokens, model=model, literal=literal
        )
        return list(
            (await self._connection.call(self._connection.stub.Tokenize, request)).token_ids
        )

    async def detokenize(self, token_ids: Sequence[int], *, model: str | None = None) -> str:
        """Join token ids into text: the inverse of ``tokenize``.

        Args:
            token_ids: The ids.
            model: See ``completion``.

        Raises:
            InvalidRequestError: An id is not in the vocabulary.
            ModelNotLoadedError: No model is loaded, or another one than ``model``.
            RunnerError: The call failed for another reason.
        """
        request = requests.detokenize_request(token_ids, model)
        return (await self._connection.call(self._connection.stub.Detokenize, request)).content

    async def embed(
        self,
        inputs: Sequence[str | Sequence[int]],
        *,
        literal: bool = False,
        request_id: str = "",
        priority: int = 0,
        model: str | None = None,
        timeout_seconds: float | None = None,
    ) -> list[Embedding]:
        """Return the vector of each text, as the files of a model that embeds describe it.

        Nothing is put before a text and nothing is cut: an instruction that the model expects is
        part of the text. Short texts are evaluated together, so few calls with many texts take the
        least time.

        Args:
            inputs: Texts, which get the special tokens that the tokenizer puts around a text, or
                token ids, which are used unchanged. At most ``Capabilities.max_embed_count``.
            literal: See ``completion``.
            request_id: See ``completion``.
            priority: Higher first among waiting requests, as for ``completion``.
            model: See ``completion``.
            timeout_seconds: The deadline. Default: ``Timeouts.first_token_seconds``.

        Raises:
            TypeError: An argument is of the wrong type.
            InvalidRequestError: There are too many texts, or one is empty.
            PromptTooLongError: A text is longer than the model embeds.
            NotSupportedError: The model is not made for embeddings, or the runner is older.
            ModelNotLoadedError: No model is loaded, or another one than ``model``.
            QueueFullError: Too many requests are waiting.
            RunnerError: The call failed for another reason.
        """
        check_number("timeout_seconds", timeout_seconds)
        request = embed_request(
            inputs, literal=literal, request_id=request_id, priority=priority, model=model
        )
        usual = self._connection.timeouts.first_token_seconds or LOAD_SECONDS
        try:
            reply = await self._connection.call(
                self._connection.stub.Embed, request, timeout_seconds or usual
            )
        except ModelUnsupportedError as error:
            raise not_supported(error) from error
        return embeddings(reply)

    async def embedding(self, content: str, *, model: str | None = None) -> Embedding:
        """Return the vector of one text; see ``embed``.

        Args:
            content: The text.
            model: See ``completion``.

        Raises:
            PromptTooLongError: The text is longer than the model embeds.
            NotSupportedError: The model is not made for embeddings, or the runner is older.
            RunnerError: The call failed for another reason.
        """
        check_text("content", content)
        (found,) = await self.embed([content], model=model)
        return found
