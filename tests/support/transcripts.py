"""Console transcripts in documents: parsing, and comparison with real output."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BLOCK = re.compile(r"^```console\n(.*?)^```", re.DOTALL | re.MULTILINE)
_PROMPT = "$ "

# Text that varies between runs and between machines.
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
    """A command and the documented output."""

    command: str
    output: str


def console_blocks(document: str) -> list[list[Step]]:
    """Return the steps of each console block of a document.

    A command begins with ``$ `` and continues after a backslash at the end of a line.
    """
    return [_steps(block) for block in _BLOCK.findall(document)]


def _steps(block: str) -> list[Step]:
    found = re.findall(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    assert found
    assert block.startswith(_PROMPT)
    return [Step(command, output.strip("\n")) for command, output in found]


def difference(expected: str, printed: str) -> str:
    """Compare an output with a document; return a description of the difference, or "".

    Numbers (except exit codes), durations and ids may differ, as may the amount of white space.
    A line ``...`` stands for any number of lines.
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
