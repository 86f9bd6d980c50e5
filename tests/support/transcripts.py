"""Console transcripts in documents: read, played again, and compared."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BLOCK = re.compile(r"^```console\n(.*?)^```", re.DOTALL | re.MULTILINE)
_PROMPT = "$ "

# What differs from run to run, and from machine to machine.
_VARIES = [
    r'"(?:device|blas)": "[^"]*"',
    r"(?<![^\n])(?:device|BLAS) .*",
    r"\b(?=[0-9a-f]*\d)[0-9a-f]{16}\b",
    r"\d[\d.,:-]*(?: ?(?:ns|µs|ms|s|B|KiB|MiB|GiB)\b)?",
    r"\|∎*",
]
_SPLIT = re.compile("|".join(f"({kind})" for kind in _VARIES))


@dataclass(frozen=True)
class Step:
    """A command, and what the document says that it prints."""

    command: str
    output: str


def blocks(document: str) -> list[list[Step]]:
    """The steps of each block of a document.

    A command begins with ``$ `` and goes on after a backslash at the end of a line.
    """
    return [_steps(block) for block in _BLOCK.findall(document)]


def _steps(block: str) -> list[Step]:
    found = re.findall(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    assert found
    assert block.startswith(_PROMPT)
    return [Step(command, output.strip("\n")) for command, output in found]


def differs(expected: str, printed: str) -> str:
    """Why an output is not what a document says; empty if it is.

    Numbers (not exit codes), durations and ids may be others, spaces more or fewer, and a line
    ``...`` stands for any lines or none.
    """
    pattern = ""
    for line in expected.splitlines():
        pattern += r"(?:.*\n)*?" if line.strip() == "..." else _line(line) + r"\s*\n"
    matches = re.fullmatch(pattern, printed.strip("\n") + "\n" if printed.strip() else "")
    return "" if matches else f"the document says\n{expected}\n\nand it printed\n{printed}"


def _line(text: str) -> str:
    if text.startswith("exit code "):
        return _plain(text)
    parts, at = [], 0
    for match in _SPLIT.finditer(text):
        parts += [_plain(text[at : match.start()]), _VARIES[(match.lastindex or 1) - 1]]
        at = match.end()
    return "".join([*parts, _plain(text[at:])])


def _plain(text: str) -> str:
    return re.sub(r"(?:\\?\s)+", r"\\s*", re.escape(text))
