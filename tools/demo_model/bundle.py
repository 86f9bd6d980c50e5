"""Write the demo model's directory: tokenizer, configuration and weights."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.llama import ModelArgs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from runner_server.chat import environment
from tools.demo_model.dialogues import Dialogue

VOCABULARY = 2048
DOCUMENT_END = "<|endoftext|>"
TURN_END = "<|end|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SPECIALS = (DOCUMENT_END, TURN_END, USER, ASSISTANT)
CONTEXT = 1024

# One turn per message, opened by the marker of the role and closed by <|end|>. The system's turn
# lists the tools. Calls have the form of the Hermes models, which mlx_lm finds by `<tool_call>` and
# `tool_call.name`.
CHAT_TEMPLATE = """
{%- macro text(content) %}
    {%- if content is string %}{{- content }}
    {%- else %}{%- for part in content or [] %}{{- part.text }}{%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- set has_system = messages and messages[0]['role'] == 'system' %}
{%- if tools or has_system %}
    {{- '<|system|>\\n' }}
    {{- text(messages[0]['content']) if has_system }}
    {{- '\\n' if tools and has_system }}
    {%- for tool in tools or [] %}
        {%- set function = tool.function or tool %}
        {{- '- ' + function.name + '(' }}
        {%- for name, schema in ((function.parameters or {}).properties or {}).items() %}
            {{- name + ': ' + (schema.type or 'any') | string }}
            {{- ', ' if not loop.last }}
        {%- endfor %}
        {{- ') ' + (function.description or '') + '\\n' }}
    {%- endfor %}
    {{- '<|end|>\\n' }}
{%- endif %}
{%- for message in (messages[1:] if has_system else messages) %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>\\n' + text(message['content']) }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set tool_call = tool_call.function or tool_call %}
            {{- '<tool_call>{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}</tool_call>' }}
        {%- endfor %}
    {%- elif message['role'] == 'tool' %}
        {{- '<|user|>\\n<tool_response>' + text(message['content']) + '</tool_response>' }}
    {%- else %}
        {{- '<|user|>\\n' + text(message['content']) }}
    {%- endif %}
    {{- '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""


def as_turns(question: str, answer: str) -> str:
    """Format one exchange as the chat template does."""
    return f"{USER}\n{question}{TURN_END}\n{ASSISTANT}\n{answer}{TURN_END}\n"


def as_parts(dialogue: Dialogue) -> Iterator[tuple[str, bool]]:
    """Divide a conversation into prompts and answers; True for the answers.

    A generated answer begins behind a tokenized prompt, so each part is tokenized by itself.
    """
    template = environment.compiled(CHAT_TEMPLATE)
    done = ""
    for index, message in enumerate(dialogue.messages):
        if message["role"] != "assistant":
            continue
        given, through = (dialogue.messages[:end] for end in (index, index + 1))
        prompt = environment.render(template, given, dialogue.tools, {})
        yield prompt.removeprefix(done), False
        done = environment.render(template, through, dialogue.tools, {})
        done = done.removesuffix(f"{ASSISTANT}\n")
        yield done.removeprefix(prompt).removesuffix("\n"), True
        done = done.removesuffix("\n")
    yield DOCUMENT_END, False


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE, which encodes any text losslessly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def architecture() -> ModelArgs:
    """Return the shape whose float16 weights fill, but stay under, four megabytes."""
    return ModelArgs(
        model_type="llama",
        hidden_size=192,
        num_hidden_layers=4,
        intermediate_size=512,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    )


def read_tokenizer(directory: Path) -> Tokenizer:
    """Read the tokenizer of an earlier run, whose weights are for these token ids."""
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def write_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    """Write the tokenizer files and the model's configuration."""
    ends = [SPECIALS.index(TURN_END), SPECIALS.index(DOCUMENT_END)]
    _replace(directory / "tokenizer.json", tokenizer.to_str(pretty=False).encode())
    _write_json(directory / "tokenizer_config.json", _tokenizer_config())
    _write_json(directory / "config.json", _model_config(ends))
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": ends[1], "eos_token_id": ends, "do_sample": False},
    )


def write_weights(directory: Path, weights: dict[str, mx.array]) -> None:
    """Write the weights as float16, replacing an earlier file in one step."""
    halves = {name: value.astype(mx.float16) for name, value in weights.items()}
    partial = directory / "partial.safetensors"
    mx.save_safetensors(str(partial), halves, metadata={"format": "mlx"})
    partial.replace(directory / "model.safetensors")


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Write the measurements of a training run, for the README and later comparison."""
    _write_json(directory / "training.json", record)


def read_record(directory: Path) -> dict[str, Any]:
    """Read the measurements of an earlier training run."""
    record: dict[str, Any] = json.loads((directory / "training.json").read_text("utf-8"))
    return record


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "bos_token": DOCUMENT_END,
        "eos_token": TURN_END,
        "pad_token": DOCUMENT_END,
        "additional_special_tokens": [USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _model_config(ends: list[int]) -> dict[str, Any]:
    shape = architecture()
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": shape.model_type,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": shape.rms_norm_eps,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": ends[1],
        "eos_token_id": ends,
        "torch_dtype": "float16",
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _replace(path, (json.dumps(value, indent=2) + "\n").encode())


def _replace(path: Path, content: bytes) -> None:
    # Replace files atomically, since the directory being rewritten may be in use.
    partial = path.with_name(f"partial-{path.name}")
    partial.write_bytes(content)
    partial.replace(path)
