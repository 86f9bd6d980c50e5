"""The tokenizer: encode and decode are exact inverses on any thread."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner_server.engine.backend import LoadedModel
from runner_server.engine.types import Sampling
from support.rows import GREEDY, Row, run_alone
from tools.local_batch import LocalBatch

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

Build = Callable[..., Path]
Load = Callable[..., LoadedModel]
TEXTS = [
    "",
    "plain text",
    "日本語 😀 👩‍🔬",
    "e\u0301 ",
    "\n\n\t x",
    "<eos> inside <user>",
    "a" * 3000,
]


@pytest.fixture
def copy(model_dir: Build, tmp_path: Path) -> Path:
    """A copy of a model for each test."""
    return Path(shutil.copytree(model_dir(), tmp_path / "model"))


def _change(path: Path, name: str, **changes: Any) -> None:
    data = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps(data | changes))


@pytest.mark.parametrize("text", TEXTS)
def test_decode_is_the_inverse_of_encode(tiny: LoadedModel, text: str) -> None:
    assert tiny.codec.decode(tiny.codec.encode(text, as_prompt=False)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_decode_is_the_inverse_of_encode_in_the_demo_model(trained: LoadedModel, text: str) -> None:
    assert trained.codec.decode(trained.codec.encode(text, as_prompt=False)) == text


def test_truncation_and_padding_in_the_file_are_ignored(load: Load, copy: Path) -> None:
    truncation = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    padding = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<eos>",
    }
    _change(copy, "tokenizer.json", truncation=truncation, padding=padding)
    codec = load(copy).codec
    text = "longer than four tokens"
    ids = codec.encode(text, as_prompt=False)
    assert len(ids) > 4
    assert codec.decode(ids) == text


def _with_bos(path: Path) -> None:
    single = [
        {"SpecialToken": {"id": "<user>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    special = {"<user>": {"id": "<user>", "ids": [1], "tokens": ["<user>"]}}
    processor = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": special,
    }
    _change(path, "tokenizer.json", post_processor=processor)
    _change(path, "tokenizer_config.json", bos_token="<user>")  # noqa: S106 - not a password


def test_a_prompt_begins_with_bos_once(load: Load, copy: Path) -> None:
    _with_bos(copy)
    codec = load(copy).codec
    plain = codec.encode("hello", as_prompt=False)
    assert 1 not in plain
    assert codec.encode("hello", as_prompt=True) == [1, *plain]
    assert codec.encode("<user>hello", as_prompt=True) == [1, *plain]
    assert codec.encode("", as_prompt=True) == [1]


def test_every_end_of_text_id_is_known(load: Load, copy: Path) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5, 9]}))
    model = load(copy)
    assert {0, 5, 9} <= model.info.eos_token_ids


def test_ids_beyond_the_tokenizer_have_no_text_and_can_be_sampled(
    load: Load, model_dir: Build
) -> None:
    model = load(model_dir(vocab_size=640))
    assert model.info.vocab_size == 640
    assert model.codec.decode([600, *model.codec.encode("ok", as_prompt=False), 639]) == "ok"
    biased = Sampling(temperature=0, logit_bias=((639, 100.0),), logprobs=2)
    assert run_alone(model, Row([1], 3, biased)) == [639] * 3


def test_many_threads_may_use_the_codec_at_once(tiny: LoadedModel) -> None:
    expected = [tiny.codec.encode(text, as_prompt=True) for text in TEXTS]
    wrong: list[object] = []

    def work() -> None:
        try:
            for _ in range(40):
                got = [tiny.codec.encode(text, as_prompt=True) for text in TEXTS]
                texts = [tiny.codec.decode(ids) for ids in got]
                if got != expected or texts != TEXTS:
                    wrong.append(got)
        except Exception as error:  # noqa: BLE001 - reported by the assertion
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_with_different_options_mix_in_half_precision(
    load: Load, model_dir: Build, dtype: str
) -> None:
    from runner_server.engine.types import Dtype
    from support.rows import run_rows

    model = load(model_dir(dtype=dtype), dtype=Dtype.AS_STORED, parallel=4)
    samplings = [
        GREEDY,
        Sampling(temperature=0, frequency_penalty=0.5, logprobs=3),
        Sampling(seed=1, repeat_penalty=1.2),
        Sampling(temperature=0, logit_bias=((3, 2.0),)),
    ]
    rows = [Row([1, 2, 3 + i], 10, sampling, late=i) for i, sampling in enumerate(samplings)]
    batch = LocalBatch.of(model)
    assert [len(ids) for ids in run_rows(batch, rows)] == [10] * 4
    batch.close()
    assert all(entry.logprob <= 0 for row in rows for entry in row.logprobs)


def test_other_threads_run_while_a_long_text_is_encoded_and_decoded(trained: LoadedModel) -> None:
    text = "def read_lines(path):\n    return [line for line in open(path)]\n" * 8000
    ids = trained.codec.encode(text, as_prompt=False)
    works: list[Callable[[], object]] = [
        lambda: trained.codec.encode(text, as_prompt=False),
        lambda: trained.codec.decode(ids),
    ]
    for work in works:
        seconds, longest_gap = _watched(work)
        assert longest_gap < seconds / 2, "this thread stood still while the other worked"


def _watched(work: Callable[[], object]) -> tuple[float, float]:
    """Return the duration of work on another thread, and the longest pause of this thread."""
    thread = threading.Thread(target=work)
    begin = last = time.perf_counter()
    longest_gap = 0.0
    thread.start()
    while thread.is_alive():
        now = time.perf_counter()
        longest_gap, last = max(longest_gap, now - last), now
    return time.perf_counter() - begin, longest_gap


# -- whole texts, for embeddings -------------------------------------------------

AROUND: dict[str, tuple[str, str, dict[str, Any]]] = {
    "no post-processor": ("", "", {}),
    "end in the post-processor": ("", "<eos>", {}),
    "beginning and end": ("<user>", "<eos>", {"bos_token": "<user>"}),
    "end that is not the end of the text": ("", "<user>", {"add_eos_token": False}),
    "beginning switched off": ("<user>", "", {"bos_token": "<user>", "add_bos_token": False}),
    "end asked for by the settings": ("<user>", "", {"bos_token": "<user>", "add_eos_token": True}),
    "end asked for twice": ("", "<eos>", {"add_eos_token": True}),
}
"""Special tokens that tokenizer.json puts before and after a text, and further settings."""


def _write_around(path: Path, before: str, after: str, settings: dict[str, Any]) -> None:
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    if before or after:
        tokens = [(text, tokenizer.token_to_id(text)) for text in {before, after} - {""}]
        single = " ".join(filter(None, (before, "$A", after)))
        template = processors.TemplateProcessing(single=single, special_tokens=tokens)
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
        tokenizer.save(str(path / "tokenizer.json"))
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("text", ["", "plain", "<eos> inside <user>", "ends with <eos>"])
def test_a_whole_text_has_the_tokens_that_transformers_puts_around_it(
    copy: Path, name: str, text: str
) -> None:
    from transformers import AutoTokenizer

    from runner_server.mlx_backend.tokenizer.codec import load_codec

    before, after, settings = AROUND[name]
    _write_around(copy, before, after, settings)
    codec, _ = load_codec(copy, {"eos_token_id": [0], "model_type": "llama"})
    expected = AutoTokenizer.from_pretrained(copy)(text)["input_ids"]
    # transformers 5 ignores these settings, which the models were trained with.
    if name == "end asked for by the settings":
        expected = [*expected, 0]
    if name == "beginning switched off":
        expected = expected[1:]
    assert codec.encode_whole(text) == expected


def test_a_literal_text_has_the_tokens_around_it(copy: Path) -> None:
    from runner_server.mlx_backend.tokenizer.codec import load_codec

    _write_around(copy, "<user>", "<eos>", {})
    codec, _ = load_codec(copy, {"eos_token_id": [0], "model_type": "llama"})
    ids = codec.encode_whole("a <eos> b", literal=True)
    assert (ids[0], ids[-1]) == (1, 0)
    assert not {0, 1} & {*ids[1:-1]}
    assert codec.decode(ids[1:-1]) == "a <eos> b"
