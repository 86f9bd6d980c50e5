"""Messages of a fake completion."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mlxrunner.v1 import runner_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence


def token_messages(
    request: pb.CompletionRequest, pieces: Sequence[str]
) -> list[pb.CompletionResponse]:
    """Return a message for each token of an answer, which a stop token ends early.

    Args:
        request: The request.
        pieces: The text of each token, whose id is its number.
    """
    options, messages = request.options, []
    for number, piece in enumerate(pieces):
        is_end = number in options.stop_token_ids and number >= options.min_predict
        text = "" if is_end else piece
        logprobs = _logprobs(request, number, text)
        messages.append(pb.CompletionResponse(content=text, token_ids=[number], logprobs=logprobs))
        if is_end:
            break
    return messages


def prompt_message(request: pb.CompletionRequest) -> pb.CompletionResponse | None:
    """Return the log probabilities of the prompt, all 0; None if they are not requested.

    The tokens of a text are the code points of its characters, as in ``Tokenize``.
    """
    if not request.HasField("prompt_logprobs"):
        return None
    is_text = request.WhichOneof("input") == "prompt"
    ids = map(ord, request.prompt) if is_text else request.prompt_token_ids.ids
    entries = [
        pb.TokenLogprob(token_id=id_, text=chr(id_), bytes=chr(id_).encode()) for id_ in [*ids][1:]
    ]
    return pb.CompletionResponse(prompt_logprobs=entries)


def embed_message(request: pb.EmbedRequest, dimension: int) -> pb.EmbedResponse:
    """Return vectors of length 1 that depend on the code points of the texts only."""
    tokens = [
        [*map(ord, given.text)] if given.WhichOneof("input") == "text" else [*given.token_ids.ids]
        for given in request.inputs
    ]
    return pb.EmbedResponse(
        embeddings=[
            pb.Embedding(values=_vector(ids, dimension), token_count=len(ids)) for ids in tokens
        ],
        prompt_eval_count=sum(map(len, tokens)),
    )


def _vector(ids: Sequence[int], dimension: int) -> list[float]:
    """Return how often each remainder of the ids occurs, divided by the length of that vector."""
    counts = [sum(id_ % dimension == index for id_ in ids) for index in range(dimension)]
    length = math.hypot(*counts) or 1.0
    return [count / length for count in counts]


def _logprobs(request: pb.CompletionRequest, number: int, text: str) -> list[pb.TokenLogprob]:
    """Return the log probability of a token if requested: 0, without alternatives."""
    wanted = request.logprob_token_ids
    if not (wanted or request.HasField("logprobs")):
        return []
    candidates = [
        pb.TopLogprob(token_id=id_, logprob=0.0 if id_ == number else -math.inf) for id_ in wanted
    ]
    return [pb.TokenLogprob(token_id=number, text=text, bytes=text.encode(), candidates=candidates)]
