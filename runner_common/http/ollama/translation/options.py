"""Options of requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxrunner.v1 import runner_pb2 as pb

if TYPE_CHECKING:
    from runner_common.http.ollama.translation.fields import Fields

_NUMBERS = (
    *("temperature", "top_p", "min_p", "repeat_penalty"),
    *("presence_penalty", "frequency_penalty"),
)
_WHOLE = ("top_k", "repeat_last_n")

TOLERATED = (
    *("num_thread", "num_gpu", "main_gpu", "num_batch", "low_vram", "numa"),
    *("use_mmap", "use_mlock", "draft_num_predict", "num_keep"),
    *("mirostat_tau", "mirostat_eta"),
)
"""Options without an effect on answers here: hardware; ``num_keep``, because a full context ends
the text instead of losing its beginning; settings of ``mirostat``, which is refused unless it is
off."""

NEUTRAL: dict[str, float | bool] = {
    "mirostat": 0,
    "tfs_z": 1,
    "typical_p": 1,
    "penalize_newline": True,
    "logits_all": False,
    "vocab_only": False,
    "embedding_only": False,
}
"""Options that are not supported, with the value that turns them off, which is accepted."""

_UNLIMITED = (-1, -2)
"""Values of ``num_predict`` for no limit, and for as much as the context holds."""

_RANDOM_SEED = -1


def read_options(fields: Fields | None) -> tuple[pb.CompletionOptions, int | None]:
    """Translate the options of a request. Their ranges are the runner's to check.

    Args:
        fields: The object ``options``; None if the request has none.

    Returns:
        The options, and the context that the request wants (``num_ctx``) if it says so.

    Raises:
        UnreadableRequestError: An option is of the wrong type, or cannot be honoured.
    """
    options = pb.CompletionOptions()
    if fields is None:
        return options, None
    values = {name: fields.number(name) for name in _NUMBERS}
    values |= {name: fields.whole(name) for name in _WHOLE}
    values["num_predict"] = _num_predict(fields)
    seed = fields.whole("seed", 64)
    values["seed"] = None if seed == _RANDOM_SEED else seed
    for name, value in values.items():
        if value is not None:
            setattr(options, name, value)
    options.stop.extend(fields.texts("stop"))
    num_ctx = fields.whole("num_ctx")
    if num_ctx is not None and num_ctx < 1:
        fields.refuse("num_ctx", f"is {num_ctx}; must be 1 or more")
    _pass_over(fields)
    return options, num_ctx


def _num_predict(fields: Fields) -> int | None:
    count = fields.whole("num_predict")
    if count in _UNLIMITED:
        return None
    if count is not None and count < 1:
        fields.refuse("num_predict", f"is {count}; must be 1 or more, or -1 for no limit")
    return count


def _pass_over(fields: Fields) -> None:
    """Accept options without an effect, and refuse the rest."""
    for name in TOLERATED:
        if not isinstance(fields.value(name), bool | int | float | None):
            fields.refuse(name, "must be a number, true or false")
    for name, off in NEUTRAL.items():
        value = fields.value(name)
        if value is not None and value != off:
            shown = str(off).lower() if isinstance(off, bool) else off
            fields.refuse(name, f"is not supported; leave it out, or send {shown}")
    fields.finish("option")
