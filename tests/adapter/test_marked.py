"""Texts in which some special tokens count and others are text."""

from __future__ import annotations

from typing import Any

import pytest

from runner_server.errors import InvalidField
from support.tokenizer_files import KINDS

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from tokenizers import AddedToken, Tokenizer, models, normalizers

from runner_server.mlx_backend.tokenizer.codec import FastCodec

MARK = "\U00013000"
TEXTS = ["", "plain 12 naïve", "{0}", "a{0}b {1}\n{0}{0}", " {1} ", "<{0}>", "{0", "x {1"]


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """A tokenizer of each kind."""
    return KINDS[request.param]()


def special(tokenizer: Any) -> list[str]:
    """Return the special tokens of a tokenizer."""
    added = tokenizer.get_added_tokens_decoder()
    return [added[id_].content for id_ in sorted(added) if added[id_].special]


def written(tokenizer: Any, template: str) -> str:
    """Return a text with special tokens, or with the beginning of one at its end."""
    first, second = special(tokenizer)[1:3]
    if template.endswith(("{0", "{1")):
        return template[:-2] + (first if template.endswith("0") else second)[:-1]
    return template.format(first, second)


@pytest.mark.parametrize("template", TEXTS)
def test_what_is_marked_is_split_as_in_a_copy_without_special_tokens(
    tokenizer: Any, template: str
) -> None:
    text = written(tokenizer, template)
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    codec = FastCodec(tokenizer, [], None).marked("")
    (marked,) = codec.mark([text], MARK)
    assert marked.replace(MARK, "") == text
    assert (MARK in marked) == ("{" in template)
    ids = copy.encode(text, add_special_tokens=False).ids
    assert codec.encode(marked, MARK) == ids
    begin, end = special(tokenizer)[1:3]
    # The text between two tokens that count is split as a whole.
    around = [tokenizer.token_to_id(begin), *ids, tokenizer.token_to_id(end)]
    assert codec.encode(f"{begin}{marked}{end}", MARK) == around


@pytest.mark.parametrize("template", TEXTS)
def test_what_has_no_marks_is_split_as_ever(tokenizer: Any, template: str) -> None:
    text = written(tokenizer, template)
    codec = FastCodec(tokenizer, [], None)
    assert codec.marked("").encode(text, MARK) == codec.encode(text, as_prompt=False)


def test_no_token_is_made_of_two_texts(tokenizer: Any) -> None:
    codec = FastCodec(tokenizer, [], None).marked("")
    for token in special(tokenizer):
        for at in range(1, len(token)):
            # A template may remove the space between them.
            parts = codec.mark([token[:at], f"{token[:at]} \n", token[at:]], MARK)
            for first in (parts[0], parts[1].rstrip()):
                ids = codec.encode(first + parts[2], MARK)
                assert tokenizer.token_to_id(token) not in ids


def test_overlapping_beginnings_are_marked_too() -> None:
    tokenizer = KINDS["byte level"]()
    tokenizer.add_special_tokens(["<<SYS>>"])
    codec = FastCodec(tokenizer, [], None).marked("")
    (marked,) = codec.mark(["<<"], MARK)
    for rest, token in (("SYS>>", "<<SYS>>"), ("s>", "<s>")):
        assert tokenizer.token_to_id(token) not in codec.encode(marked + rest, MARK)


def test_markers_of_the_template_need_not_be_special() -> None:
    tokenizer = KINDS["Qwen"]()
    # As in DeepSeek V3: markers of roles that the file does not call special.
    tokenizer.add_tokens(
        [AddedToken(t, normalized=True) for t in ("<\uff5cUser\uff5c>", "\n\n", "<b>")]
    )
    template = "{{ '<\uff5cUser\uff5c>' }}\n\n{% if x %}"
    codec = FastCodec(tokenizer, [], None).marked(template)
    user, breaks, bold = map(tokenizer.token_to_id, ("<\uff5cUser\uff5c>", "\n\n", "<b>"))
    text = "<\uff5cUser\uff5c>\n\n<b>"
    (marked,) = codec.mark([text], MARK)
    assert codec.encode(text, MARK) == [user, breaks, bold]
    ids = codec.encode(marked, MARK)
    assert (ids[-2:], user in ids) == ([breaks, bold], False)


def test_a_token_that_cannot_be_text_is_refused_by_name() -> None:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), *((letter, -1.0) for letter in "ab<>s")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>")])
    codec = FastCodec(tokenizer, [], None).marked("")
    assert codec.encode("<s>a<unk>\u65e5b", MARK) == [1, 2, 0, 0, 3]
    # The last one is "<s>" only after the tokenizer's own normalization.
    for text in ("<s>", "a<s>b", "\uff1cs\uff1e"):
        (marked,) = codec.mark([text], MARK)
        with pytest.raises(InvalidField) as refused:
            codec.encode(f"<s>{marked}", MARK)
        ((field, problem),) = refused.value.violations
        assert field == "literal"
        assert "'<s>'" in problem


def test_any_character_can_be_the_mark(tokenizer: Any) -> None:
    codec = FastCodec(tokenizer, [], None).marked("")
    token = special(tokenizer)[1]
    found = []
    for mark in (MARK, "\U00013001", "\U00013002", "~"):
        (marked,) = codec.mark([token], mark)
        found.append(codec.encode(marked, mark))
    assert found == found[:1] * 4
