"""A few hundred texts, chosen to be hard to tokenize and to detokenize."""

from __future__ import annotations

import itertools

_WRITING = [
    "The quick brown fox jumps over the lazy dog.",
    "naïve café, Ünïcödé, ß ſ İ ı",
    "日本語のテキスト、漢字とカナ。",
    "中文没有空格，但是有标点。",
    "한국어 문장입니다",
    "עברית מימין לשמאל",
    "العربية من اليمين إلى اليسار ١٢٣",
    "हिन्दी में लिखा हुआ",
    "ภาษาไทยไม่มีช่องว่าง",
    "Ελληνικά και Кириллица",
    "𝕯𝖔𝖚𝖇𝖑𝖊 𝔰𝔱𝔯𝔲𝔠𝔨 𐍈 𒀀",
    "e\u0301 o\u0308\u0332 a\u0300\u0301\u0302\u0303 \u0301",
    "ﬁ ① ａｂ ½ ™ \u212b \uac01 \u1100\u1161",
    "👩‍🔬👨‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽❤️‍🔥",
    "😀🎉" * 8,
    "\u200b\u200d\ufeff\u2060\u00ad",
    "\u202ertl\u202c \u2066isolated\u2069",
    "\U0010ffff\ue000\ufdd0",
    "a\ufffdb \ufffd",
    "▁ ▁▁a Ġ Ċ Ã©",
]
_SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\u00a0", "\u3000", "\u2028", "\x0b", "\x85"]
_CONTROL = ["\0", "\x01", "\x1b[31m", "\x7f", "\x80", "\x9f"]
_NUMBERS = [
    "0",
    "12",
    "123",
    "1234",
    "12345678",
    "3.14159",
    "-1e-9",
    "1,234,567.89",
    "0x1F",
    "١٢٣",
    "2023-11-28",
    "9" * 60,
]
_CODE = [
    "def f(x: int) -> None:\n    return x if x else None  # noqa\n",
    "for (int i = 0; i < n; ++i) {\n\ta[i] += b[i] << 2;\n}\n\n\n",
    "SELECT * FROM t WHERE a='b''c' AND d<>\"e\";",
    '{"key": ["va\\"lue", null, 1.5e3, "\\u00e9"]}',
    "<html><!-- c --><p class='x'>&amp;</p></html>",
    "if err != nil {\r\n\treturn fmt.Errorf(`%w`, err)\r\n}",
    "let x = a?.b ?? `${c}`;//\\\\",
    "we'll don't I'M they'RE y'all's 'tis",
    "https://example.org/a_b?c=d&e=%20#f",
    "a_b-c.d/e\\f|g~h^i`j@k$l%m",
]
_SPECIAL_LIKE = [
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "<bos>",
    "<|endoftext|>",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|begin_of_text|>x",
    "[INST] hi [/INST]",
    "<start_of_turn>user\nhi<end_of_turn>",
    "<｜begin▁of▁sentence｜>x<｜end▁of▁sentence｜>",
    "<|eot_id|> <| eot_id |>",
    "<|start|>assistant<|channel|>final<|message|>",
]
_BLOCKS = [*range(0, 0x800, 64), *range(0x1E00, 0x3100, 64), *range(0x1F300, 0x1FA00, 64)]
"""First code points of runs of 64 characters: alphabets, marks, symbols, kana, emoji."""


def hard_texts() -> list[str]:
    """Return the texts, without duplicates."""
    plain = [*_WRITING, *_NUMBERS, *_CODE]
    texts = [
        "",
        *plain,
        *_SPACES,
        *_CONTROL,
        *_SPECIAL_LIKE,
        *(f" {text}" for text in plain),
        *(f"{text} " for text in plain),
        *(f"{space}a{space}b{space}" for space in _SPACES),
        *(f"{one}{two}x" for one, two in itertools.product(_SPACES[:7], repeat=2)),
        *(f"a{code}b {code}" for code in _CONTROL),
        *(f"x{text}y" for text in _SPECIAL_LIKE),
        *(f"{text} {text}" for text in _SPECIAL_LIKE),
        *(one + two for one, two in itertools.pairwise(_WRITING)),
        *("ab" * count for count in (50, 500)),
        *(char * count for char in "a 日😀\n" for count in (7, 17, 100)),
        *("".join(chr(start + i) for i in range(64)) for start in _BLOCKS),
    ]
    return list(dict.fromkeys(texts))


def plain_texts() -> list[str]:
    """Return the texts without anything like a special token or a part of one."""
    special = (*_SPECIAL_LIKE, "<")
    return [text for text in hard_texts() if not any(mark in text for mark in special)]
