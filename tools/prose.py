"""Measure the prose of docstrings and comments: ``python -m tools.prose PATH... [--show]``.

Prints three figures for each path and exits with 1 if any is above its limit:

- share of docstring summaries that open with a clause or a pronoun, not a verb or a noun;
- share of docstring summaries with a pronoun, which the summary alone rarely explains;
- idioms that technical English avoids, per 1,000 words of docstrings and comments.

``--show`` lists the summaries and idioms behind the figures.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MAX_OPENS = 0.03
MAX_LEANS = 0.22
MAX_IDIOMS = 1.0
"""Limits of the figures. Public code measures 0 to 1 %, 12 to 20 % and 0 to 0.5 per 1,000 words:
httpx 0.28.1, structlog 26.1.0, svcs 26.2.0, trio 0.35.0 and uvicorn 0.54.0."""

_CLAUSE = re.compile(
    r"(What|Whether|Who|Whose|Where|How|Which|When|That|Those|The same|It|Its|They|Their|All|So"
    r"|Nothing)\b"
)
_PRONOUN = re.compile(r"\b(it|its|they|them|those|that|all|so many|so long)\b", re.IGNORECASE)
_IDIOMS = {
    "clause as a noun": (
        r"\b[Ww]hat (?:it|they|is|was|has|a|the|this|that|must|may|can|one|others)\b"
    ),
    "negation of a noun": r"\b(?:is|are|was|be) no (?!longer|more|way|need|point|reason)\w+",
    "indefinite person": r"\b(?:[Ww]hoever|[Nn]obody|[Ee]verybody|[Ss]omebody)\b",
    "informed object": r"\b(?:is|are|be|was) told\b|\btells? of\b",
    "perfect of motion": r"\b(?:has|have) (?:come|gone)\b",
    "vague quantity": r"\bso (?:many|long|much|far)\b(?! (?:as|that))",
    "dated word": r"\bfor ever\b|\bmend(?:s|ed|ing)?\b",
    "obligation": r"\b(?:is|are|was) to (?:be|stay|have|take|tell|end|stop|say|do|load)\b",
}
_SKIPPED_FOLDERS = frozenset({"node_modules", "build", "dist", "target"})

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Finding:
    """A summary or an idiom counted in one of the figures.

    Attributes:
        path: Source file.
        line: Line number, starting at 1.
        kind: ``opens``, ``leans``, or the name of the idiom.
        text: The summary or the idiom.
    """

    path: Path
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"  {self.path}:{self.line}: {self.kind}: {self.text}"


@dataclass
class Measurement:
    """Figures of a set of files.

    Attributes:
        summaries: Number of docstring summaries.
        words: Number of words in docstrings and comments.
        findings: Summaries and idioms counted in the figures.
    """

    summaries: int = 0
    words: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def opens(self) -> float:
        """Share of summaries opening with a clause or a pronoun."""
        return self._count("opens") / max(1, self.summaries)

    @property
    def leans(self) -> float:
        """Share of summaries containing a pronoun."""
        return self._count("leans") / max(1, self.summaries)

    @property
    def idioms(self) -> float:
        """Number of idioms per 1,000 words."""
        return 1000 * self._count(*_IDIOMS) / max(1, self.words)

    @property
    def is_within_limits(self) -> bool:
        """True if every figure is within the limit."""
        return self.opens <= MAX_OPENS and self.leans <= MAX_LEANS and self.idioms <= MAX_IDIOMS

    def add(self, path: Path, source: str) -> None:
        """Add the docstrings and comments of a source file."""
        tree = ast.parse(source)
        for line, summary in _summaries(tree):
            self.summaries += 1
            self.findings += _check_summary(path, line, summary)
        for line, passage in [*_strings(tree), *_comments(source)]:
            self.words += len(passage.split())
            self.findings += _find_idioms(path, line, passage)

    def _count(self, *kinds: str) -> int:
        found = Counter(finding.kind for finding in self.findings)
        return sum(found[kind] for kind in kinds)


def measure(files: Iterable[Path]) -> Measurement:
    """Measure the docstrings and comments of source files."""
    measurement = Measurement()
    for file in files:
        measurement.add(file, file.read_text(encoding="utf-8"))
    return measurement


def python_files(path: Path) -> list[Path]:
    """Return the Python files below a path, without build outputs and generated stubs."""
    if path.is_file():
        return [path]
    return [file for file in sorted(path.rglob("*.py")) if _is_source(file.relative_to(path))]


def _is_source(file: Path) -> bool:
    is_skipped = any(part.startswith(".") or part in _SKIPPED_FOLDERS for part in file.parts)
    return not is_skipped and "_pb2" not in file.name


def _summaries(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line number and first line of every docstring."""
    for node in ast.walk(tree):
        if isinstance(node, _Documented) and (docstring := ast.get_docstring(node)):
            yield node.body[0].lineno, docstring.strip().splitlines()[0]


def _strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line number and text of every docstring, also of attributes and constants."""
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text


def _comments(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def _check_summary(path: Path, line: int, summary: str) -> Iterator[Finding]:
    if _CLAUSE.match(summary):
        yield Finding(path, line, "opens", summary)
    if _PRONOUN.search(summary):
        yield Finding(path, line, "leans", summary)


def _find_idioms(path: Path, line: int, passage: str) -> Iterator[Finding]:
    for kind, pattern in _IDIOMS.items():
        for match in re.finditer(pattern, passage):
            at = line + passage.count("\n", 0, match.start())
            yield Finding(path, at, kind, match.group())


def report(path: Path, measurement: Measurement) -> str:
    """Format the figures of a path on one line."""
    return (
        f"{path}: {measurement.summaries} summaries, {measurement.opens:.0%} open with a clause, "
        f"{measurement.leans:.0%} contain a pronoun; {measurement.idioms:.1f} idioms per 1,000 "
        f"words of {measurement.words:,}{'' if measurement.is_within_limits else '  ABOVE LIMIT'}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every path, print the figures, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.prose", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="files or directories")
    parser.add_argument("--show", action="store_true", help="list the summaries and idioms")
    arguments = parser.parse_args(argv)
    if missing := [str(path) for path in arguments.paths if not path.exists()]:
        parser.error(f"no such file or directory: {', '.join(missing)}")
    is_within_limits = True
    for path in arguments.paths:
        measurement = measure(python_files(path))
        print(report(path, measurement))
        if arguments.show:
            sys.stdout.writelines(f"{finding}\n" for finding in measurement.findings)
        is_within_limits = is_within_limits and measurement.is_within_limits
    return 0 if is_within_limits else 1


if __name__ == "__main__":
    sys.exit(main())
