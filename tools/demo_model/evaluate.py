"""Compare a model's answers with held-out conversations: ``python -m tools.demo_model.evaluate``.

Every answer of a conversation is generated greedily after the turns before it as they are written,
so that a wrong answer does not spoil the next one.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.llama import Model
from tokenizers import Tokenizer

from runner_server.chat import environment
from tools.demo_model import bundle
from tools.demo_model.dialogues import Dialogue, Message, Writer

SEED = 0
MAX_TOKENS = 120
CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"


def score(model: Model, tokenizer: Tokenizer, count: int) -> dict[str, int]:
    """Count the right answers in ``count`` held-out conversations.

    Returns:
        ``calls`` and ``texts``: answers that should call a tool, and that should not.
        ``well_formed``, ``right_name``, ``right_calls``: of ``calls``, those that parse, name the
        tool, and also have exactly the arguments. ``right_texts``: of ``texts``, those equal word
        for word.
    """
    writer = Writer(SEED, held_out=True)
    counts: Counter[str] = Counter()
    for dialogue in (writer.dialogue() for _ in range(count)):
        for prompt, expected in _answers(dialogue):
            _count(counts, expected, generate(model, tokenizer, prompt))
    return dict(sorted(counts.items()))


def generate(model: Model, tokenizer: Tokenizer, prompt: str) -> str:
    """Return the greedy answer to a prompt, without its end token."""
    ends = {bundle.SPECIALS.index(mark) for mark in (bundle.TURN_END, bundle.DOCUMENT_END)}
    cache = make_prompt_cache(model)
    given, found = tokenizer.encode(prompt).ids, list[int]()
    while len(found) < MAX_TOKENS:
        logits = model(mx.array([given]), cache=cache)[0, -1]
        token = int(logits.argmax().item())
        if token in ends:
            break
        found.append(token)
        given = [token]
    text: str = tokenizer.decode(found, skip_special_tokens=False)
    return text


def _answers(dialogue: Dialogue) -> list[tuple[str, Message]]:
    template = environment.compiled(bundle.CHAT_TEMPLATE)
    return [
        (environment.render(template, dialogue.messages[:index], dialogue.tools, {}), message)
        for index, message in enumerate(dialogue.messages)
        if message["role"] == "assistant"
    ]


def _count(counts: Counter[str], expected: Message, found: str) -> None:
    if "tool_calls" not in expected:
        counts["texts"] += 1
        counts["right_texts"] += found == expected["content"]
        return
    (wanted,) = expected["tool_calls"]
    call = _parsed(found)
    counts["calls"] += 1
    counts["well_formed"] += call is not None
    counts["right_name"] += call is not None and call.get("name") == wanted["function"]["name"]
    counts["right_calls"] += call == wanted["function"]


def _parsed(text: str) -> dict[str, Any] | None:
    """Return the call in an answer; None if there is anything but a JSON object."""
    if not (text.startswith(CALL_BEGIN) and text.endswith(CALL_END)):
        return None
    try:
        call = json.loads(text.removeprefix(CALL_BEGIN).removesuffix(CALL_END))
    except ValueError:
        return None
    return call if isinstance(call, dict) else None


def main() -> None:
    """Print the score of a model's directory, and add the score to its training record."""
    parser = argparse.ArgumentParser(description="Score the demo model's answers.")
    parser.add_argument("model", type=Path, help="directory of the model")
    parser.add_argument("--count", type=int, default=200, help="conversations")
    options = parser.parse_args()
    model = Model(bundle.architecture())
    model.load_weights(str(options.model / "model.safetensors"))
    model.set_dtype(mx.float32)
    found = score(model, bundle.read_tokenizer(options.model), options.count)
    bundle.write_record(options.model, bundle.read_record(options.model) | {"answers": found})
    click.echo(json.dumps(found))


if __name__ == "__main__":
    main()
