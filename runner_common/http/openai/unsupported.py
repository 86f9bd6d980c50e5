"""Fields of OpenAI's interface without an effect here, tolerated or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner_common.http.fields import Fields

TOLERATED = (
    "metadata",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "user",
)
"""Fields that do not change an answer: names for the caller's own accounting, and hints that only
concern speed and price."""

NEUTRAL: dict[str, tuple[object, ...]] = {
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "store": (False,),
    "suffix": ("",),
    "verbosity": ("medium",),
}
"""Values by field that ask for nothing beyond the default. Other values are refused."""

REFUSED = {
    "audio": "models here write text only",
    "best_of": "only the value of n: choices are not compared",
    "echo": "the prompt is not repeated; prompt_logprobs of the gRPC interface score it",
    "function_call": "replaced by tool_choice",
    "functions": "replaced by tools",
    "modalities": 'models here write text only: ["text"]',
    "moderation": "answers are not moderated",
    "store": "answers are not stored",
    "suffix": "text is not inserted; put it into the prompt in the model's own form",
    "verbosity": "models here have no such control; say it in the prompt",
    "web_search_options": "models here do not search",
}
"""Why fields are refused, by name. Fields of neither kind are refused as unknown."""


def check_unsupported(fields: Fields) -> None:
    """Record unread fields as problems, except for harmless ones."""
    for name in TOLERATED:
        fields.take(name)
    for name, values in NEUTRAL.items():
        if fields.has(name) and (value := fields.take(name)) not in values:
            # `False == 0`, which is harmless here.
            fields.refuse(name, f"{_shown(value)}: {REFUSED[name]}")
    fields.end(REFUSED)


def _shown(value: object) -> str:
    return repr(value)[:40]
