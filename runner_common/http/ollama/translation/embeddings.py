"""Requests for vectors of texts, and their answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner_common.http.ollama.translation.fields import Fields
from runner_common.http.ollama.translation.keep_alive import read_keep_alive
from runner_common.http.ollama.translation.options import read_options
from runner_common.http.ollama.translation.requests import Call, read_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runner_common.http.body import JsonObject

_LEAST_NORM = 1e-12


@dataclass(frozen=True, slots=True)
class Embedding(Call):
    """A request for vectors.

    Attributes:
        texts: The texts; none if the model is only to be loaded.
        dimensions: How many numbers of each vector are wanted; None for all of them.
    """

    texts: list[str]
    dimensions: int | None


def read_embed(body: JsonObject) -> Embedding:
    """Read a request of ``/api/embed``.

    Raises:
        UnreadableRequestError: A field is of the wrong type, or cannot be honoured.
    """
    fields = Fields(body)
    given = fields.value("input")
    texts = fields.texts("input") if isinstance(given, list) else _only(fields, "input")
    dimensions = fields.whole("dimensions") or None
    if dimensions is not None and dimensions < 1:
        fields.refuse("dimensions", f"is {dimensions}; must be 1 or more")
    # Texts are never cut: one that is too long is refused, whatever this says.
    fields.flag("truncate")
    return _embedding(fields, texts, dimensions)


def read_old_embedding(body: JsonObject) -> Embedding:
    """Read a request of ``/api/embeddings``, which has one text.

    Raises:
        UnreadableRequestError: A field is of the wrong type, or cannot be honoured.
    """
    fields = Fields(body)
    return _embedding(fields, _only(fields, "prompt"), None)


def _only(fields: Fields, name: str) -> list[str]:
    """Return the only text of a request as a list, empty without text."""
    text = fields.text(name)
    return [text] if text else []


def _embedding(fields: Fields, texts: list[str], dimensions: int | None) -> Embedding:
    model, keep_alive = read_model(fields), read_keep_alive(fields)
    _, num_ctx = read_options(fields.inner("options"))
    fields.finish()
    return Embedding(model, keep_alive, num_ctx, texts, dimensions)


def unit_vector(values: Sequence[float], dimensions: int | None) -> list[float]:
    """Return the first numbers of a vector, scaled to length 1 as in the original."""
    values = values[:dimensions]
    norm = max(math.sqrt(math.fsum(each * each for each in values)), _LEAST_NORM)
    return [each / norm for each in values]
