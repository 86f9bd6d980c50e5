"""Special tokens written in a literal text are text."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.errors import InvalidField
from support.harness import Server, failure
from support.tokenizer_files import KINDS

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from tokenizers import AddedToken, Tokenizer, models, normalizers

from runner_server.mlx_backend.tokenizer.codec import FastCodec, load_codec

TEXTS = ["", "plain 12 naïve", "{0}", "a{0}b {1}\n{0}{0}", " {1} ", "<{0}>"]


def _special(tokenizer: Any) -> dict[int, str]:
    added = tokenizer.get_added_tokens_decoder()
    return {id_: token.content for id_, token in added.items() if token.special}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """A tokenizer of each kind."""
    return KINDS[request.param]()


@pytest.mark.parametrize("template", TEXTS)
def test_a_literal_text_has_no_special_tokens(tokenizer: Any, template: str) -> None:
    """Compare with a copy without special tokens, as the library makes it."""
    text = template.format(*[*_special(tokenizer).values()][1:])
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    codec = FastCodec(tokenizer, [], None)
    ids = codec.encode(text, as_prompt=False, literal=True)
    assert ids == copy.encode(text, add_special_tokens=False).ids
    assert not _special(tokenizer).keys() & set(ids)
    usual = codec.encode(text, as_prompt=False)
    assert (usual == ids) == ("{" not in template)


def test_tokens_that_are_not_marked_as_special_stay_tokens() -> None:
    tokenizer = KINDS["Qwen"]()
    codec = FastCodec(tokenizer, [], None)
    id_ = tokenizer.token_to_id("<tool_call>")
    assert codec.encode("<tool_call>", as_prompt=False, literal=True) == [id_]


def test_a_literal_prompt_gets_its_beginning_even_if_the_text_has_it(tmp_path: Path) -> None:
    tokenizer = KINDS["Llama 2"]()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    codec, _ = load_codec(tmp_path, {})
    bos = tokenizer.token_to_id("<s>")
    text = "<s>hello"
    ids = codec.encode(text, as_prompt=False, literal=True)
    assert codec.encode(text, as_prompt=True, literal=True) == [bos, *ids]
    assert codec.encode(text, as_prompt=True)[0] == bos
    assert bos not in ids


def _unigram() -> Any:
    """Return a tokenizer with whole pieces, special tokens among them."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), *((letter, -1.0) for letter in "ab<>s")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>")])
    return tokenizer


def test_a_token_that_cannot_be_text_is_refused_by_name() -> None:
    codec = FastCodec(_unigram(), [], None)
    # The last one is "<s>" only after the tokenizer's own normalization.
    for text in ("a<s>b", "<s>", "\uff1cs\uff1e"):
        with pytest.raises(InvalidField) as refused:
            codec.encode(text, as_prompt=True, literal=True)
        ((field, problem),) = refused.value.violations
        assert field == "literal"
        assert "'<s>'" in problem


def test_an_unknown_character_is_not_refused() -> None:
    codec = FastCodec(_unigram(), [], None)
    assert codec.encode("a\u65e5b", as_prompt=False, literal=True) == [2, 0, 3]


def test_literal_and_other_texts_do_not_disturb_each_other(tokenizer: Any) -> None:
    special = [*_special(tokenizer).values()]
    text = "one two " + "".join(special)
    codec = FastCodec(tokenizer, [], None)
    expected = [codec.encode(text, as_prompt=False, literal=literal) for literal in (False, True)]
    assert expected[0] != expected[1]

    def split(number: int) -> list[int]:
        return codec.encode(text, as_prompt=False, literal=bool(number % 2))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(split, range(400)))
    assert found == expected * 200


async def test_a_literal_text_goes_through_the_server(demo: Server) -> None:
    text = "<|user|>hello<|end|>"
    ids = []
    for literal in (False, True):
        request = pb.TokenizeRequest(content=text, literal=literal)
        ids.append(list((await demo.stub.Tokenize(request)).token_ids))
        last = (await demo.complete(text, literal=literal, num_predict=1))[-1]
        assert last.prompt_eval_count == len(ids[-1])
    usual, literal_ids = ids
    assert set(usual) & {1, 2}
    assert not set(literal_ids) & {0, 1, 2, 3}
    shown = await demo.stub.Detokenize(pb.DetokenizeRequest(token_ids=literal_ids))
    assert shown.content == text
    of_ids = pb.CompletionRequest(prompt_token_ids=pb.TokenIds(ids=usual), literal=True)
    problem = await failure(demo.stub.Completion(of_ids))
    assert set(problem.violations) == {"literal"}
