"""Names of models in requests to a pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runner_client.errors import InvalidRequestError
from runner_common.contract import MAX_MODEL_CHARS

if TYPE_CHECKING:
    from collections.abc import Collection

_MAX_LISTED = 8


class ModelNames:
    """Decides which model a request means.

    Args:
        configured: Names of the configured models.
    """

    def __init__(self, configured: Collection[str]) -> None:
        self._configured = tuple(configured)

    def resolve(self, model: str) -> str:
        """Return the model of a request; an empty name means the only configured one.

        Raises:
            InvalidRequestError: The name is missing or too long.
        """
        if len(model) > MAX_MODEL_CHARS or "\0" in model:
            raise _invalid(f"at most {MAX_MODEL_CHARS} characters, none of them NUL")
        if model:
            return model
        if len(self._configured) == 1:
            return self._configured[0]
        if not self._configured:
            raise _invalid("required: no model is configured")
        known = ", ".join(self._configured[:_MAX_LISTED])
        raise _invalid(f"required: this pool has several models; configured are {known}")


def _invalid(text: str) -> InvalidRequestError:
    return InvalidRequestError(f"model: {text}", field_violations=[("model", text)])
