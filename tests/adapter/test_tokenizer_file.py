"""The tokenizer follows tokenizer.json, regardless of the other files."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from tokenizers import AddedToken, Tokenizer, processors

import support.tokenizer_files as tokenizer_files
from runner_server.errors import ModelUnsupported
from runner_server.mlx_backend.tokenizer import codec as codec_module
from runner_server.mlx_backend.tokenizer.codec import load_codec
from support.tokenizer_files import KINDS, added_tokens_decoder, with_template, write_tokenizer

TEXTS = [
    "",
    " ",
    "The quick brown fox",
    " begins with a space",
    "  two  spaces ",
    "naïve cafe\u0301 日本語 😀 unseen: Ж",
    "you're I'LL 12345\n\n\n x",
    "<s>begins with it",
    "in <s> the </s> middle <pad><extra>",
    "<bos>x<|im_start|>user<|im_end|><|endoftext|><eos> <unk>",
]
NAMED: dict[str, dict[str, Any]] = {
    "byte level": {"bos_token": "<s>", "eos_token": "</s>"},
    "digits apart": {"bos_token": "<s>", "eos_token": "</s>"},
    "Qwen": {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "Gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "boi_token": "<mask>"},
    "Llama 2": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}
CLASSES = [
    None,
    "CohereTokenizerFast",
    "GPT2Tokenizer",
    "GPTNeoXTokenizerFast",
    "GemmaTokenizerFast",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "NobodysTokenizer",
    "PreTrainedTokenizerFast",
    "Qwen2Tokenizer",
    "TokenizersBackend",
]
TYPES = ["gemma3_text", "llama", "nobodys", "qwen2", "qwen3", "starcoder2"]


@pytest.fixture(autouse=True)
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test in which transformers is asked to read a tokenizer."""

    def forbidden(*_arguments: object) -> None:
        raise AssertionError("transformers is to read a tokenizer.json")

    monkeypatch.setattr(codec_module, "read_with_transformers", forbidden)


def _codec(path: Path, **config: Any) -> codec_module.FastCodec:
    return load_codec(path, {"model_type": "llama", "eos_token_id": [7]} | config)[0]


def _prompt(tmp_path: Path, tokenizer: Tokenizer, text: str, **settings: Any) -> list[int]:
    """Write a tokenizer with settings and return the ids of a prompt."""
    write_tokenizer(tmp_path, tokenizer, settings)
    return _codec(tmp_path).encode(text, as_prompt=True)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_follow_the_file_whichever_class_is_named(tmp_path: Path, kind: str, name: str) -> None:
    file = KINDS[kind]()
    settings = NAMED[kind] | ({"tokenizer_class": name} if name else {})
    write_tokenizer(tmp_path, file, settings | {"add_prefix_space": True, "legacy": True})
    codec = _codec(tmp_path)
    for text in TEXTS:
        ids = file.encode(text, add_special_tokens=False).ids
        assert codec.encode(text, as_prompt=False) == ids, text
        assert codec.decode(ids) == file.decode(ids, skip_special_tokens=False), text


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("name", ["tekken.json", "vocab.json", "tokenizer.model", "merges.txt"])
def test_ids_do_not_depend_on_the_model_type_or_other_files(
    tmp_path: Path, model_type: str, name: str
) -> None:
    file = tokenizer_files.digits_apart()
    write_tokenizer(tmp_path, file, NAMED["digits apart"] | {"tokenizer_class": "GPT2Tokenizer"})
    (tmp_path / name).write_text("{}")
    codec = _codec(tmp_path, model_type=model_type, model_name="qwen2")
    assert codec.encode("1999 foxes", as_prompt=True) == file.encode("1999 foxes").ids


@pytest.mark.parametrize("text", TEXTS)
def test_a_leading_space_is_kept(tmp_path: Path, text: str) -> None:
    write_tokenizer(tmp_path, tokenizer_files.llama2(), {"tokenizer_class": "LlamaTokenizer"})
    codec = _codec(tmp_path)
    if "<s>" not in text and "<unk>" not in text:
        assert codec.decode(codec.encode(text, as_prompt=False)) == text


def test_merge_dropout_is_disabled(tmp_path: Path) -> None:
    file = tokenizer_files.byte_level()
    ids = file.encode("The quick brown fox").ids
    file.model.dropout = 1.0
    write_tokenizer(tmp_path, file, NAMED["byte level"])
    assert file.encode("The quick brown fox").ids != ids
    assert _codec(tmp_path).encode("The quick brown fox", as_prompt=True) == ids


def test_split_special_tokens_is_obeyed(tmp_path: Path) -> None:
    file = tokenizer_files.byte_level()
    write_tokenizer(tmp_path, file, NAMED["byte level"] | {"split_special_tokens": True})
    file.encode_special_tokens = True
    assert _codec(tmp_path).encode("a</s>", as_prompt=False) == file.encode("a</s>").ids


# -- beginning of a prompt -------------------------------------------------------

ENDS = ("</s>", 1)
BEGINS = ("<s>", 0)
PROCESSORS: dict[str, tuple[Callable[[Tokenizer], Any], list[int]]] = {
    "none": (lambda _: None, []),
    "byte level": (lambda _: processors.ByteLevel(trim_offsets=False), []),
    "template": (lambda t: with_template(t, "<s> $A").post_processor, [0]),
    "template, several": (
        lambda t: with_template(t, "<unk> <s> $A </s> <s>").post_processor,
        [2, 0],
    ),
    "template, behind only": (lambda t: with_template(t, "$A </s>").post_processor, []),
    "bert": (lambda _: processors.BertProcessing(ENDS, BEGINS), [0]),
    "roberta": (lambda _: processors.RobertaProcessing(ENDS, BEGINS), [0]),
    "sequence": (
        lambda t: processors.Sequence(
            [processors.ByteLevel(), with_template(t, "<s> $A </s>").post_processor]
        ),
        [0],
    ),
    "sequence, the other way": (
        lambda t: processors.Sequence(
            [processors.BertProcessing(ENDS, BEGINS), with_template(t, "<unk> $A").post_processor]
        ),
        [2, 0],
    ),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_a_prompt_gets_the_special_tokens_before_a_text_and_none_after(
    tmp_path: Path, case: str
) -> None:
    tokenizer = tokenizer_files.byte_level()
    make, prefix = PROCESSORS[case]
    tokenizer.post_processor = make(tokenizer)
    write_tokenizer(tmp_path, tokenizer, NAMED["byte level"])
    codec = _codec(tmp_path)
    for text in TEXTS:
        plain = codec.encode(text, as_prompt=False)
        expected = plain if plain[:1] == [0] else prefix + plain
        assert codec.encode(text, as_prompt=True) == expected, text


@pytest.mark.parametrize("text", ["hello", "", "<s>", "<s>hello", "hello<s>"])
@pytest.mark.parametrize("in_file", [True, False])
def test_add_bos_token_is_obeyed(tmp_path: Path, text: str, *, in_file: bool) -> None:
    tokenizer = tokenizer_files.byte_level()
    if in_file:
        with_template(tokenizer, "<s> $A </s>")
    plain = tokenizer.encode(text, add_special_tokens=False).ids
    with_bos = plain if text.startswith("<s>") else [0, *plain]
    names = NAMED["byte level"]
    for settings, expected in (
        ({"add_bos_token": True, "add_eos_token": True, **names}, with_bos),
        ({"add_bos_token": False, "add_eos_token": True, **names}, plain),
        ({"add_bos_token": None, **names}, with_bos if in_file else plain),
        (names, with_bos if in_file else plain),
        ({"add_bos_token": True, **names, "bos_token": None}, with_bos if in_file else plain),
    ):
        assert _prompt(tmp_path, tokenizer, text, **settings) == expected, settings


def test_a_text_with_a_complete_beginning_gets_no_second_one(tmp_path: Path) -> None:
    # As in GLM: two tokens in front, and no beginning-of-text token is named.
    tokenizer = with_template(tokenizer_files.byte_level(), "<unk> <s> $A")
    plain = tokenizer.encode("<unk><s>hello", add_special_tokens=False).ids
    assert plain[:2] == [2, 0]
    assert _prompt(tmp_path, tokenizer, "<unk><s>hello") == plain
    assert _prompt(tmp_path, tokenizer, "hello") == plain
    assert _prompt(tmp_path, tokenizer, "<unk>hello") == [2, 0, *plain[:1], *plain[2:]]


# -- special tokens described in other files -------------------------------------


def test_tokenizer_json_suffices_without_settings(tmp_path: Path) -> None:
    file = tokenizer_files.gemma()
    write_tokenizer(tmp_path, file, None)
    codec, ends = load_codec(tmp_path, {"model_type": "llama"})
    assert codec.encode("a fox", as_prompt=True) == file.encode("a fox").ids
    assert ends == frozenset()


@pytest.mark.parametrize("form", ["text", "object"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_token_roles_are_read_from_either_file(tmp_path: Path, name: str, form: str) -> None:
    write_tokenizer(tmp_path, tokenizer_files.byte_level(), None)
    token = "</s>" if form == "text" else {"__type": "AddedToken", "content": "</s>"}
    (tmp_path / name).write_text(json.dumps({"eos_token": token}))
    assert load_codec(tmp_path, {"model_type": "llama", "eos_token_id": [7, 9]})[1] == {1, 7, 9}


def test_a_described_token_missing_from_the_file_is_added(tmp_path: Path) -> None:
    whole = tokenizer_files.byte_level()
    whole.add_special_tokens(["<turn>", AddedToken("<end>", rstrip=True)])
    last = whole.get_vocab_size() - 1
    settings = {"eos_token": "<end>", "added_tokens_decoder": added_tokens_decoder(whole)}
    write_tokenizer(tmp_path, tokenizer_files.byte_level(), settings)
    codec, ends = load_codec(tmp_path, {"model_type": "llama", "eos_token_id": [7]})
    assert ends == {7, last}
    text = "a<turn>b<end>  c"
    assert codec.encode(text, as_prompt=False) == whole.encode(text).ids
    assert codec.decode([last]) == "<end>"


def test_tokens_of_added_tokens_json_are_added(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, tokenizer_files.byte_level(), {})
    last = tokenizer_files.byte_level().get_vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<b>": last + 1, "<a>": last}))
    assert _codec(tmp_path).encode("<a><b>", as_prompt=False) == [last, last + 1]


def test_a_described_word_of_the_vocabulary_becomes_a_token(tmp_path: Path) -> None:
    tokenizer = tokenizer_files.byte_level()
    word = max(filter(str.isalpha, tokenizer.get_vocab(with_added_tokens=False)), key=len)
    id_ = tokenizer.token_to_id(word)
    assert id_ not in tokenizer.encode(f"x{word}x").ids
    settings = {"added_tokens_decoder": {str(id_): {"content": word, "special": True}}}
    write_tokenizer(tmp_path, tokenizer, settings)
    assert id_ in _codec(tmp_path).encode(f"x{word}x", as_prompt=False)


def test_a_token_keeps_its_id_in_the_file(tmp_path: Path) -> None:
    moved = {"5": {"content": "</s>", "special": True}}
    write_tokenizer(
        tmp_path,
        tokenizer_files.byte_level(),
        {"eos_token": "</s>", "added_tokens_decoder": moved},
    )
    assert load_codec(tmp_path, {"model_type": "llama"})[1] == {1}


LACKING: dict[str, dict[str, Any]] = {
    "a described id that is not the next": {
        "added_tokens_decoder": {"9000": {"content": "<extra>", "special": True}}
    },
    "an end of text without an id": {"eos_token": "<extra>"},
    "a beginning of text that is to be added": {"bos_token": "<extra>", "add_bos_token": True},
}


@pytest.mark.parametrize("case", LACKING)
def test_a_required_token_without_an_id_is_refused_by_name(tmp_path: Path, case: str) -> None:
    write_tokenizer(tmp_path, tokenizer_files.byte_level(), LACKING[case])
    with pytest.raises(ModelUnsupported, match="<extra>") as caught:
        _codec(tmp_path)
    assert "tokenizer.json" in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"pad_token": "<extra>"},
        {"bos_token": "<extra>"},
        {"additional_special_tokens": [{"content": "<extra>"}]},
        {"extra_special_tokens": {"image_token": "<extra>"}},
    ],
    ids=str,
)
def test_an_optional_token_without_an_id_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    file = tokenizer_files.byte_level()
    write_tokenizer(tmp_path, file, settings)
    assert _codec(tmp_path).encode("<extra>", as_prompt=True) == file.encode("<extra>").ids
    assert "'<extra>'" in caplog.text


# -- large files -----------------------------------------------------------------


@pytest.mark.exhaustive
def test_reading_a_large_file_takes_as_long_as_the_library_alone(tmp_path: Path) -> None:
    """A file like Gemma 3's takes 1.2 to 1.4 s of CPU; transformers took 9.4 s."""
    tokenizer_files.write_large_tokenizer(tmp_path)
    library, whole = (
        min(_cpu_seconds(work) for _ in range(2))
        for work in (
            lambda: Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
            lambda: _codec(tmp_path),
        )
    )
    assert whole < 1.3 * library + 0.1


def _cpu_seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


# -- unusable files --------------------------------------------------------------

BROKEN: dict[str, tuple[str, str]] = {
    "the tokenizer is not JSON": ("tokenizer.json", "{"),
    "the tokenizer is another thing": ("tokenizer.json", '{"a": 1}'),
    "settings that are not JSON": ("tokenizer_config.json", "{"),
    "settings that are a list": ("tokenizer_config.json", "[]"),
    "settings that are not UTF-8": ("tokenizer_config.json", "\ud800"),
    "nested too deep": ("special_tokens_map.json", "[" * 100_000),
    "a number as a token": ("tokenizer_config.json", '{"eos_token": 5}'),
    "tokens that are text": ("tokenizer_config.json", '{"added_tokens_decoder": "x"}'),
    "a token without content": ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {}}}'),
    "an id that is not a number": ("added_tokens.json", '{"<a>": "x"}'),
    "a list in a list": ("tokenizer_config.json", '{"additional_special_tokens": [[]]}'),
    "a number as a list": ("tokenizer_config.json", '{"extra_special_tokens": 5}'),
}


@pytest.mark.parametrize("case", BROKEN)
def test_unusable_files_are_refused_by_name(tmp_path: Path, case: str) -> None:
    name, text = BROKEN[case]
    write_tokenizer(tmp_path, tokenizer_files.byte_level(), {})
    (tmp_path / name).write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ModelUnsupported, match=r"token.*\.json"):
        _codec(tmp_path)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, tokenizer_files.byte_level(), {})
    plain = _codec(tmp_path).encode("a b", as_prompt=True)
    file = tmp_path / "tokenizer.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert _codec(tmp_path).encode("a b", as_prompt=True) == plain


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"],
)
def test_a_git_lfs_pointer_is_recognized(tmp_path: Path, name: str) -> None:
    write_tokenizer(tmp_path, tokenizer_files.byte_level(), {})
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(ModelUnsupported, match=rf"{re.escape(name)} is a Git LFS pointer"):
        _codec(tmp_path)


def test_end_tokens_known_to_mlx_lm_are_the_fallback(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, tokenizer_files.byte_level(), {"eos_token": "</s>"})
    config = {"model_type": "muse_spark"}
    assert load_codec(tmp_path, config)[1] == {1, 200001, 200008}
    assert load_codec(tmp_path, config | {"eos_token_id": [5]})[1] == {1, 5}
