"""Save tiny models with transformers: ``python -m tools.parity.contender FOLDER [TYPE...]``.

Writes a folder for each case, with the output of ``save_pretrained``, a tokenizer, and
``expected.json``: a prompt and the log probabilities of the next token. Runs in a separate
environment, since this project does not depend on PyTorch.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from tools.parity.cases import CASES, Case

VOCABULARY = 96
PROMPT = [(7 * i * i + 11 * i + 3) % (VOCABULARY - 3) + 3 for i in range(48)]

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "n_embd": 64,
    "intermediate_size": 96,
    "ffn_hidden_size": 96,
    "n_inner": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}
"""Sizes applied to every type that has a setting of that name."""

_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")


def _sized(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return settings with small sizes, truncating lists that have one entry per layer."""
    result = copy.deepcopy(settings)
    for part in (result, result.get("text_config")):
        if not isinstance(part, dict):
            continue
        part.update({name: value for name, value in SIZES.items() if part.get(name) is not None})
        part.update(
            {name: value for name, value in changes.items() if name in part or part is result}
        )
        layers = part.get("num_hidden_layers") or part.get("n_layer")
        for name in _LISTS:
            if isinstance(part.get(name), list):
                part[name] = part[name][:layers]
    return result


def _write(case: Case, folder: Path) -> None:
    settings = _sized(AutoConfig.for_model(case.type).to_dict(), case.changes)
    settings.pop("model_type", None)
    config = AutoConfig.for_model(case.type, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            # Norms start as ones and biases as zeros, which would hide whether they are applied.
            if value.ndim == 1:
                value.add_(torch.randn_like(value) * 0.1)
            elif "embed" in name:
                value.copy_(torch.randn_like(value))
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, -1].float()
    expected = torch.log_softmax(logits, -1).tolist()
    version = transformers.__version__
    (folder / "expected.json").write_text(
        json.dumps({"prompt": PROMPT, "logprobs": expected, "transformers": version})
    )


def _write_tokenizer(folder: Path) -> None:
    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def main() -> int:
    """Write the cases named on the command line, by default every one; return the exit code."""
    root, wanted = Path(sys.argv[1]), sys.argv[2:]
    for case in CASES:
        if wanted and case.name not in wanted and case.type not in wanted:
            continue
        folder = root / case.name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _write(case, folder)
        except Exception as error:  # noqa: BLE001 - shown in the table
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            (folder / "problem.txt").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
