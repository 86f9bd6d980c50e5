"""Build the demo model's training text from the Python that runs it.

The sources are in the interpreter's own standard library: modules, their docstrings, and the
language reference in ``pydoc_data.topics``. All are under the PSF License Version 2 and already on
the machine, so the model can be retrained without downloads.
"""

import ast
import importlib
import inspect
import re
import sysconfig
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

# Tests teach assertions rather than code; the rest is generated tables, vendored code, or
# text that is read elsewhere (``pydoc_data``).
SKIPPED_FOLDERS = frozenset(
    (
        *("test", "tests", "site-packages", "idlelib", "lib2to3", "encodings"),
        *("pydoc_data", "turtledemo", "__phello__"),
    )
)
SKIPPED_FILES = frozenset(("html/entities.py", "locale.py", "stringprep.py"))
SKIPPED_NAMES = re.compile(r"_sysconfigdata|^config-")
MAX_FILE_BYTES = 250_000

# Modules written in C, whose docstrings are not in a Python source file.
C_MODULES = ("builtins", "itertools", "math", "time", "sys", "_collections", "_functools")
C_TYPES = (str, bytes, list, dict, set, tuple, int, float)

MAX_CODE = 900
MAX_PROSE = 600
# The reference is a small share of the text, but the part that users ask about.
REFERENCE_REPEATS = 3
HELD_OUT_IN = 50
TOPIC = "topic "

_HEADING = re.compile(r"^(\S.*)\n([*=\-~^])\2{2,}\n", re.MULTILINE)
# Typographic quotes would cost a small vocabulary three bytes each.
_TYPOGRAPHY = str.maketrans(
    {
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{HORIZONTAL ELLIPSIS}": "...",
        "\N{EN DASH}": "-",
    }
)

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Exchange:
    """A question and an answer, both derived from the same source."""

    question: str
    answer: str


@dataclass(frozen=True)
class Source:
    """A named text and the exchanges derived from it.

    The name decides whether the whole source is held out, so that validation text does not occur
    in another form during training.
    """

    name: str
    text: str
    exchanges: tuple[Exchange, ...]

    @property
    def held_out(self) -> bool:
        """True if this source belongs to the validation set.

        Topics are never held out: they quote one another at length, so the text of a held-out
        topic would still be in the training set.
        """
        return not self.name.startswith(TOPIC) and zlib.crc32(self.name.encode()) % HELD_OUT_IN == 0


def collect() -> list[Source]:
    """Read every source: modules, the language reference and C docstrings."""
    return [*_modules(), *_reference(), *_c_docstrings()]


def _modules() -> Iterator[Source]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _wanted(relative) and path.stat().st_size <= MAX_FILE_BYTES:
            yield _module(relative, path)


def _wanted(relative: Path) -> bool:
    if relative.as_posix() in SKIPPED_FILES or SKIPPED_FOLDERS.intersection(relative.parts):
        return False
    return not any(SKIPPED_NAMES.search(part) for part in relative.parts)


def _module(relative: Path, path: Path) -> Source:
    text = path.read_text(encoding="utf-8", errors="replace").expandtabs(8)
    name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
    return Source(name, text, tuple(_module_exchanges(name, text)))


def _module_exchanges(module: str, text: str) -> Iterator[Exchange]:
    tree = ast.parse(text)
    about = ast.get_docstring(tree)
    if about:
        yield Exchange(f"What is the module `{module}` for?", _opening(about))
    for scope, node in _definitions(tree, ""):
        doc = ast.get_docstring(node)
        if doc and not doc.startswith(">>>"):
            yield from _definition_exchanges(module, scope, node, doc, text)


def _definitions(parent: ast.Module | ast.ClassDef, scope: str) -> Iterator[tuple[str, Definition]]:
    for node in parent.body:
        if isinstance(node, Definition):
            yield scope, node
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node, f"{scope}{node.name}.")


def _definition_exchanges(
    module: str, scope: str, node: Definition, doc: str, text: str
) -> Iterator[Exchange]:
    verb = "What is {}?" if isinstance(node, ast.ClassDef) else "What does {} do?"
    yield Exchange(verb.format(f"{module}.{scope}{node.name}"), _opening(doc))
    code = _code(node, text)
    if len(code) <= MAX_CODE:
        yield Exchange(_request(scope, node, doc), code)


def _request(scope: str, node: Definition, doc: str) -> str:
    summary = " ".join(doc.split("\n\n", maxsplit=1)[0].split())
    if isinstance(node, ast.ClassDef):
        return f"Write a class `{node.name}`. {summary}"
    if scope:
        return f"Write a method `{scope}{node.name}`. {summary}"
    if zlib.crc32(node.name.encode()) % 3:
        return f"Write a function `{node.name}`. {summary}"
    return f"Write a function to {summary[:1].lower()}{summary[1:]}"


def _code(node: Definition, text: str) -> str:
    first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
    lines = text.splitlines()[first - 1 : node.end_lineno]
    indent = " " * node.col_offset
    return "\n".join(line.removeprefix(indent) for line in lines)


def _opening(text: str) -> str:
    """Return the leading paragraphs that fit, but at least one."""
    kept: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        if kept and sum(map(len, kept)) + len(paragraph) > MAX_PROSE:
            break
        kept.append(paragraph)
    return "\n\n".join(kept)[: 2 * MAX_PROSE].rstrip()


def _reference() -> Iterator[Source]:
    for topic, raw in sorted(topics.items()):
        text = raw.translate(_TYPOGRAPHY)
        yield Source(f"{TOPIC}{topic}", text, tuple(_topic_exchanges(topic, text)))


def _topic_exchanges(topic: str, text: str) -> Iterator[Exchange]:
    for title, body in _sections(text):
        answer = _opening(body)
        named = title.replace('"', "`")
        named = named[:1].lower() + named[1:] if named.startswith("The ") else named
        questions = [f"What is {named}?", f"Explain {named}.", f"Tell me about {named}."]
        if text.startswith(title):
            questions.append(f"Explain the topic `{topic}`.")
        for question in questions:
            yield from [Exchange(question, answer)] * REFERENCE_REPEATS


def _sections(text: str) -> Iterator[tuple[str, str]]:
    marks = list(_HEADING.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, end in zip(marks, ends, strict=True):
        body = text[mark.end() : end].strip()
        if body:
            yield mark.group(1), body


def _c_docstrings() -> Iterator[Source]:
    for name in C_MODULES:
        prefix = "" if name == "builtins" else f"{name.lstrip('_')}."
        yield from _c_sources(prefix, vars(importlib.import_module(name)))
    for kind in C_TYPES:
        yield from _c_sources(f"{kind.__name__}.", vars(kind))


def _c_sources(prefix: str, members: Mapping[str, object]) -> Iterator[Source]:
    for name, member in members.items():
        doc = inspect.getdoc(member) if callable(member) else None
        if doc and not name.startswith("_"):
            exchange = Exchange(f"What does {prefix}{name} do?", _opening(doc))
            yield Source(f"doc {prefix}{name}", "", (exchange,) * REFERENCE_REPEATS)
