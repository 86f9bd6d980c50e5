"""Forms of calls whose arguments come one by one, as read by mlx_lm's parsers."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Write = Callable[[str], str]
"""Function from a text to its tokens and texts in the syntax of Lark."""

ANY = "(?s:.*)"
_BLANK = r"[\s\x1c-\x1f]*"
"""White space as Python strips it, which some parsers do."""

NULL = rf"{_BLANK}(<!\[CDATA\[)?(?i:null)(\]\]>)?{_BLANK}"
"""Text that some parsers read as null, whatever the schema says."""

Way = Literal["own", "json", "text", "python"]
"""Way to write a value other than null where null is allowed:

- ``own``: as without null;
- ``json``: as JSON;
- ``text``: as without null, for texts and lists only, because the parser reads numbers as texts;
- ``python``: as a literal of Python, except for lists, whose JSON has other words than Python.
"""

_DASHED = re.compile(r"[A-Za-z0-9_-]{1,64}")
_WORD = re.compile(r"[A-Za-z0-9_]{1,64}")
_IDENTIFIER = re.compile(rf"(?!(?:{'|'.join(keyword.kwlist)})$)[A-Za-z_][A-Za-z0-9_]{{0,63}}")


@dataclass(frozen=True)
class FlatForm:
    """A form of calls.

    Attributes:
        call: Texts before the name of the tool, after it, and after the arguments.
        key: Texts before the name of an argument and after it, TYPE for the type of its schema.
        end: Text after a number.
        quotes: Texts before and after a text.
        excluded: Pattern of the markers that a text cannot have inside.
        body: Pattern of a text.
        separator: Text between two arguments.
        after: Text after the quote of a text.
        names: Pattern of the names of tools and arguments.
        lists: Whether lists are JSON, have texts with the form's quotes, or cannot be read.
        any_of: Way to write values if ``anyOf`` allows null.
        types: Way to write values if ``type`` is a list.
        apart: Pattern of the texts that are read as another value where null is allowed.
    """

    call: tuple[str, str, str]
    key: tuple[str, str]
    end: str
    quotes: tuple[str, str]
    excluded: str
    body: str = ANY
    separator: str = ""
    after: str = ""
    names: re.Pattern[str] = _DASHED
    lists: Literal["json", "quoted", "none"] = "json"
    any_of: Way = "own"
    types: Way = "own"
    apart: str = ""


_NIL = rf"{_BLANK}(<!\[CDATA\[)?(?i:none|nil)(\]\]>)?{_BLANK}"
"""Text that MiniMax's parser reads as null where null is allowed."""

_GLM = FlatForm(
    call=("", "\n", ""),
    key=("<arg_key>", "</arg_key>\n<arg_value>"),
    end="</arg_value>\n",
    quotes=("", "</arg_value>"),
    after="\n",
    excluded="<\\/tool_call>",
    any_of="json",
    types="json",
)
FORMS: Mapping[str, FlatForm] = {
    "function_gemma": FlatForm(
        call=("call:", "{", "}"),
        key=("", ":"),
        end="",
        quotes=("<escape>", "<escape>"),
        separator=",",
        body="[^}]*",
        excluded="<end_function_call>",
        names=_WORD,
        lists="none",
    ),
    "gemma4": FlatForm(
        call=("call:", "{", "}"),
        key=("", ":"),
        end="",
        quotes=('<|"|>', '<|"|>'),
        separator=",",
        body="[^\\x00]*",
        excluded="<tool_call\\|>",
        names=_WORD,
        lists="quoted",
    ),
    "glm47": _GLM,
    "kimi_k3": FlatForm(
        call=('<|open|>call tool="', '" index="1"<|sep|>', "<|close|>call<|sep|>"),
        key=('<|open|>argument key="', '" type="TYPE"<|sep|>'),
        end="<|close|>argument<|sep|>",
        quotes=("", "<|close|>argument<|sep|>"),
        excluded="<\\|open\\|>json|<\\|close\\|>(call|tools)<\\|sep\\|>",
    ),
    "laguna": _GLM,
    "minicpm5": FlatForm(
        call=('"', '">', ""),
        key=('<param name="', '">'),
        end="</param>",
        quotes=("", "</param>"),
        excluded="<\\/function>",
        apart=_NIL,
    ),
    "minimax_m2": FlatForm(
        call=('\n<invoke name="', '">\n', "</invoke>\n"),
        key=('<parameter name="', '">'),
        end="</parameter>\n",
        quotes=("", "</parameter>"),
        after="\n",
        excluded="<\\/(invoke|minimax:tool_call)>",
        apart=_NIL,
    ),
    "pythonic": FlatForm(
        call=("[", "(", ")]"),
        key=("", "="),
        end="",
        quotes=('"', '"'),
        separator=", ",
        body='([^"\\\\\\x00-\\x1f]|\\\\["\\\\nt])*',
        excluded="<\\|tool_call_end\\|>",
        names=_IDENTIFIER,
        lists="quoted",
    ),
    "qwen3_coder": FlatForm(
        call=("\n<function=", ">\n", "</function>\n"),
        key=("<parameter=", ">\n"),
        end="\n</parameter>\n",
        quotes=("", "</parameter>"),
        after="\n",
        excluded="<\\/(function|tool_call)>",
        any_of="text",
        types="python",
        apart=rf"\s*[\[{{]{ANY}",
    ),
}
