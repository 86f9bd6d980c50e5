"""Conversations of an asyncio client, and its connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from runner_client.rpc.aio_calls import Connection
from runner_client.rpc.messages import chats

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from runner_client.rpc.aio_stream import AsyncChatStream
    from runner_client.rpc.transport.base import Peer
    from runner_client.types import (
        ChatCompletion,
        ChatMessage,
        Constraint,
        Options,
        RenderedChat,
        Timeouts,
        TlsFiles,
        Tool,
    )


class AsyncChatClient:
    """Base of ``AsyncModelClient``: the connection, and the calls with conversations."""

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls: TlsFiles | None = None,
        timeouts: Timeouts | None = None,
        peer: Peer | None = None,
    ) -> None:
        self._connection = Connection(address, timeouts, token, tls, peer)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address!r})"

    @property
    def address(self) -> str:
        """The runner's address, as passed to gRPC."""
        return self._connection.address

    @property
    def timeouts(self) -> Timeouts:
        """The timeouts of this client."""
        return self._connection.timeouts

    def chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Tool] = (),
        tool_choice: Literal["auto", "none", "required"] = "auto",
        chat_template_kwargs: Mapping[str, object] | None = None,
        options: Options | None = None,
        logprobs: int | None = None,
        request_id: str = "",
        priority: int = 0,
        model: str | None = None,
        bypass_prefix_cache: bool = False,
        cache_salt: str = "",
        literal: bool = False,
        logprob_token_ids: Sequence[int] = (),
        constraint: Constraint | None = None,
        adapter: str = "",
        tool_name: str = "",
        reasoning_budget: int | None = None,
    ) -> AsyncChatStream:
        """Start an answer to a conversation and return the stream of chunks without waiting.

        Args:
            messages: The conversation, in order.
            tools: The tools that the model may call.
            tool_choice: ``"none"`` for an answer without calls; the model gets no tools then.
                ``"required"`` for one of calls alone.
            chat_template_kwargs: More arguments for the template, such as
                ``{"enable_thinking": False}``.
            options: See ``completion``, as for all arguments below.
            logprobs: See ``completion``.
            request_id: See ``completion``.
            priority: See ``completion``.
            model: See ``completion``.
            bypass_prefix_cache: See ``completion``.
            cache_salt: See ``completion``.
            literal: Whether the special tokens written in messages and tools are text.
            logprob_token_ids: See ``completion``.
            constraint: What the answer must be, after its reasoning; see ``completion``.
            adapter: See ``completion``.
            tool_name: The one tool to call, with ``tool_choice="required"``. Default: any.
            reasoning_budget: The most tokens of reasoning, which is then ended. Default: no limit.

        Raises:
            TypeError: An argument is of the wrong type.
            InvalidRequestError: An argument cannot be sent.
            RunnerUnavailableError: The client is closed. Reading raises all other errors.
        """
        request = chats.chat_request(
            messages,
            tools=tools,
            tool_choice=tool_choice,
            chat_template_kwargs=chat_template_kwargs,
            options=options,
            logprobs=logprobs,
            request_id=request_id,
            priority=priority,
            model=model,
            bypass_prefix_cache=bypass_prefix_cache,
            cache_salt=cache_salt,
            literal=literal,
            logprob_token_ids=logprob_token_ids,
            constraint=constraint,
            adapter=adapter,
            tool_name=tool_name,
            reasoning_budget=reasoning_budget,
        )
        return self._connection.start_chat(request)

    async def complete_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Tool] = (),
        tool_choice: Literal["auto", "none", "required"] = "auto",
        chat_template_kwargs: Mapping[str, object] | None = None,
        options: Options | None = None,
        logprobs: int | None = None,
        request_id: str = "",
        priority: int = 0,
        model: str | None = None,
        bypass_prefix_cache: bool = False,
        cache_salt: str = "",
        literal: bool = False,
        logprob_token_ids: Sequence[int] = (),
        constraint: Constraint | None = None,
        adapter: str = "",
        tool_name: str = "",
        reasoning_budget: int | None = None,
    ) -> ChatCompletion:
        """Answer a conversation to the end, with the arguments of ``chat``.

        Raises:
            TypeError: An argument is of the wrong type.
            InvalidRequestError: An argument is out of range, the model has no chat template, or
                the template refuses the conversation.
            RunnerError: The answer failed for another reason; see ``complete``.
        """
        stream = self.chat(
            messages,
            tools=tools,
            tool_choice=tool_choice,
            chat_template_kwargs=chat_template_kwargs,
            options=options,
            logprobs=logprobs,
            request_id=request_id,
            priority=priority,
            model=model,
            bypass_prefix_cache=bypass_prefix_cache,
            cache_salt=cache_salt,
            literal=literal,
            logprob_token_ids=logprob_token_ids,
            constraint=constraint,
            adapter=adapter,
            tool_name=tool_name,
            reasoning_budget=reasoning_budget,
        )
        async with stream:
            return chats.join_chat_chunks([chunk async for chunk in stream])

    async def render_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Tool] = (),
        chat_template_kwargs: Mapping[str, object] | None = None,
        model: str | None = None,
        literal: bool = False,
    ) -> RenderedChat:
        """Render a conversation with the model's chat template.

        Args:
            messages: The conversation, in order.
            tools: The tools that the template describes to the model.
            chat_template_kwargs: More arguments for the template, such as
                ``{"enable_thinking": False}``.
            model: See ``completion``.
            literal: See ``chat``.

        Raises:
            TypeError: An argument is of the wrong type.
            InvalidRequestError: The model has no chat template, or the template refuses the
                conversation.
            ModelUnsupportedError: The template is not valid.
            ModelNotLoadedError: No model is loaded, or another one than ``model``.
            RunnerError: The call failed for another reason.
        """
        request = chats.render_chat_request(
            messages,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            model=model,
            literal=literal,
        )
        return chats.rendered_chat(
            await self._connection.call(self._connection.stub.RenderChat, request)
        )

    async def close(self) -> None:
        """Close the connection. Pending calls raise ``RunnerUnavailableError``."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
