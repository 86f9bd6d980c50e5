"""A real model whose weights are a script: each token has one successor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from support.embedding_models import say_that_it_embeds

END = "<|end|>"

SCRIPTS = (
    ("<|assistant|>", "<think>", "One and", " one: é.", "</think>", "Two", ", 日本."),
    ("<|brief|>", "Two"),
    (
        "<|tools|>",
        "I look.",
        "<tool_call>",
        '{"name": "get_weather", ',
        '"arguments": {"place": "Zürich", "days": 2}}',
        "</tool_call>",
    ),
    ("<|result|>", "It rains", " in Zürich."),
)
"""What the model writes, token by token, after the special tokens that end its prompts.

A token of two scripts goes on as in the first one.
"""

TEMPLATE = """
{%- if messages[0].role == 'developer' %}{{ raise_exception('no developers here') }}{% endif %}
{%- for tool in tools or [] %}{{ tool.function.name }}: {{ tool.function.parameters | tojson -}}
{{ '; ' }}{% endfor %}
{%- for message in messages %}[{{ message.role }}]
{%- if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}
{%- for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}
{%- endfor %}
{%- if messages[-1].role == 'tool' %}<|result|>
{%- elif tools %}<|tools|>
{%- elif enable_thinking is defined and not enable_thinking %}<|brief|>
{%- else %}<|assistant|>{% endif %}"""

_CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_WIDTH = 320
"""Dimensions of the model, more than it has tokens: each token has one of its own."""
_LOGIT = 20.0
"""Logit of the successor; all others have 0, so that its probability is almost 1."""


def build_scripted_model(path: Path) -> Path:
    """Write a model directory and return the path. The model embeds texts, too.

    The tokenizer is byte-level: it has a token for each byte and one for each text of the scripts.
    """
    path.mkdir(parents=True)
    ids = _write_tokenizer(path)
    _write_weights(path, ids)
    config = _CONFIG | {"hidden_size": _WIDTH, "vocab_size": len(ids), "eos_token_id": ids[END]}
    (path / "config.json").write_text(json.dumps(config))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return say_that_it_embeds(path)


def _write_tokenizer(path: Path) -> dict[str, int]:
    """Write a tokenizer; return the ids of its tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, *(script[0] for script in SCRIPTS)])
    texts = dict.fromkeys(text for script in SCRIPTS for text in script[1:])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "tool_parser_type": "json_tools",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return dict(tokenizer.get_vocab(with_added_tokens=True))


def _write_weights(path: Path, ids: dict[str, int]) -> None:
    """Write weights that hand each token's embedding to the output layer unchanged."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_map
    from mlx_lm.models.llama import Model, ModelArgs

    count = len(ids)
    args = _CONFIG | {"hidden_size": _WIDTH, "vocab_size": count}
    model = Model(ModelArgs.from_dict(args))
    # Attention and MLP add nothing.
    model.update(tree_map(mx.zeros_like, model.parameters()))
    head = np.zeros((count, _WIDTH), np.float32)
    for token, successor in _successors(ids):
        # The normalization scales the embedding, a unit vector, to this length.
        head[successor, token] = _LOGIT / _WIDTH**0.5
    model.model.embed_tokens.weight = mx.eye(count, _WIDTH)
    model.model.norm.weight = mx.ones(_WIDTH)
    model.lm_head.weight = mx.array(head)
    model.save_weights(str(path / "model.safetensors"))


def _successors(ids: dict[str, int]) -> Iterator[tuple[int, int]]:
    """Yield each token with its successor; ``END`` follows all that no script has."""
    texts = dict.fromkeys(ids, END)
    for script in reversed(SCRIPTS):
        texts |= dict(pairwise(script))
    yield from ((ids[text], ids[successor]) for text, successor in texts.items())
