"""The known differences between a model's files and its computation in mlx_lm.

Imports no MLX; :mod:`runner_server.mlx_backend.model.exactness` finds the differences.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner_server.errors import ModelUnsupported


@dataclass(frozen=True)
class Difference:
    """Part of a model, as specified by its files, that mlx_lm does not compute.

    Attributes:
        text: A description of the difference.
        harmless_tokens: The longest sequence, in tokens, that the difference does not affect; 0 if
            it affects all sequences.
    """

    text: str
    harmless_tokens: int = 0


@dataclass(frozen=True)
class Exactness:
    """The known differences between a built model and the model's files.

    Attributes:
        differences: The known differences.
    """

    differences: tuple[Difference, ...] = ()

    @property
    def length(self) -> int | None:
        """The longest sequence, in tokens, unaffected by any difference; None without a limit."""
        return min((each.harmless_tokens for each in self.differences), default=None)

    def require(self, path: object, *, allow: bool) -> None:
        """Refuse a model with differences that affect sequences of every length.

        Args:
            path: The model's directory.
            allow: Whether to accept such a model.

        Raises:
            ModelUnsupported: There are such differences, and ``allow`` is False.
        """
        always = [each.text for each in self.differences if not each.harmless_tokens]
        if always and not allow:
            raise ModelUnsupported(
                f"{path} cannot be computed as its files say: {'; '.join(always)}. To load it "
                "anyway, with answers that differ from the model's, set allow_inexact",
                model=str(path),
            )

    def warnings(self, context_length: int) -> tuple[str, ...]:
        """Return the warnings for a model loaded with a given context length."""
        return tuple(self._warning(each, context_length) for each in self.differences)

    @staticmethod
    def _warning(difference: Difference, context_length: int) -> str:
        exact = difference.harmless_tokens
        if context_length <= exact:
            return f"{difference.text}; no sequence within this context length is affected"
        if exact:
            return f"{difference.text}: answers differ in sequences of more than {exact} tokens"
        return f"{difference.text}: answers differ from the model's"
