"""The chat format of a model: the templates of its prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ChatFormat:
    """How a model writes conversations, as its files say.

    Attributes:
        templates: Jinja templates by name; a model with one template has ``"default"`` only.
        special_tokens: Texts of the special tokens by role (``bos_token``, ...), for the templates.
        python_template: File of mlx_lm's template in Python, used instead of ``templates``; empty
            if there is none.
        problem: Why the templates cannot be used, if a file cannot be read.
    """

    templates: Mapping[str, str] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    python_template: str = ""
    problem: str = ""

    @property
    def has_template(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self.templates or self.python_template) and not self.problem
