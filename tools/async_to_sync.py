"""Generate the sync side of the client from the asyncio side: ``python -m tools.async_to_sync``.

Works on tokens, so that comments, docstrings and their layout are kept: ``async`` and ``await``
disappear, names and words follow the tables below, and ruff formats the result. What truly
differs (deadlines, waiting, cancellation) is in modules written by hand for both sides, with the
same names.

``--check`` writes nothing and exits with 1 if a generated file is stale.
"""

from __future__ import annotations

import argparse
import io
import itertools
import keyword
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]

NAMES = {
    "AsyncChatClient": "ChatClient",
    "AsyncChatStream": "ChatStream",
    "AsyncCompletionStream": "CompletionStream",
    "AsyncIterator": "Iterator",
    "AsyncModelClient": "ModelClient",
    "AsyncPendingLoad": "PendingLoad",
    "AsyncRunnerClient": "RunnerClient",
    "AsyncRunnerProcess": "RunnerProcess",
    "AsyncStatusStream": "StatusStream",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "aio_calls": "calls",
    "aio_chat_client": "chat_client",
    "aio_client": "client",
    "aio_load": "load",
    "aio_model_client": "model_client",
    "aio_stream": "stream",
    "aio_supervision": "supervision",
    "asynccontextmanager": "contextmanager",
}
"""Names of the asyncio side and their counterparts, in code, strings and comments."""

_AWAITING_WORD = r"\basync (?=def\b|for\b|with\b)|\bawait "
_ASYNC_NAME = re.compile(
    r"\w*async\w*|(\w*_)?aio(_\w*)?|aiter|anext|__a(enter|exit|iter|next)__", re.IGNORECASE
)
_KEYWORDS = frozenset({"async", "await"})
_TEXTS = frozenset({"STRING", "COMMENT", "FSTRING_MIDDLE"})
_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")

_Edit = tuple[tuple[int, int], tuple[int, int], str]
"""Start and end, each a line and a column as in a token, and the text in place of the passage."""


class UnknownNameError(Exception):
    """A name or a passage that the tables do not translate."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A file of the asyncio side and the file generated from it.

    Attributes:
        source: Path of the source, relative to the repository.
        target: Path of the generated file.
        passages: Passages of docstrings that differ, as in the source and as generated. Each
            must occur in the source.
    """

    source: str
    target: str
    passages: Mapping[str, str] = field(default_factory=dict)


PAIRS = (
    Pair(
        "runner_client/rpc/aio_load.py",
        "runner_client/rpc/load.py",
        {"an asyncio client": "a sync client"},
    ),
    Pair(
        "runner_client/rpc/aio_chat_client.py",
        "runner_client/rpc/chat_client.py",
        {"an asyncio client": "a sync client"},
    ),
    Pair(
        "runner_client/rpc/aio_model_client.py",
        "runner_client/rpc/model_client.py",
        {"an asyncio client": "a sync client"},
    ),
    Pair(
        "runner_client/rpc/aio_client.py",
        "runner_client/rpc/client.py",
        {
            "Asyncio client of": "Sync client of",
            "Asyncio client for": "Client for",
            "A client belongs to the event loop of its first call; any number of its tasks may "
            "share it.\n"
            "    A client does not survive a fork, because gRPC does not: create it after the "
            "fork, or spawn.\n": (
                "Thread-safe: threads may share a client, and ``close()`` ends the calls of all of "
                "them. In\n"
                "    asyncio use ``AsyncRunnerClient``. A client does not survive a fork, because "
                "gRPC does not:\n"
                "    create it after the fork, or spawn instead.\n"
            ),
            "\n    Cancelling a task cancels its call and raises ``asyncio.CancelledError`` as "
            "usual.": "",
        },
    ),
    Pair(
        "runner_client/process/aio_process.py",
        "runner_client/process/process.py",
        {
            "Asyncio runner in": "Sync runner in",
            "call and stop, in asyncio.": "call and stop.",
            "As an async context manager": "As a context manager",
            "A runner belongs to the event loop that runs ``load``; tasks on that loop may share "
            "it.\n"
            "    Blocking work (reading the model's headers, spawning, reaping) runs in threads. "
            "Cancelling\n"
            "    a task in ``load`` or on entry stops the child, and cancelling one in ``close`` "
            "kills it.\n"
            "    Calls that are pending when the runner is closed raise "
            "``RunnerUnavailableError``; if the\n"
            "    child dies, they raise ``RunnerExitedError``.\n": (
                "Thread-safe: threads may share a runner, and ``close()`` may be called from any "
                "thread at any\n"
                "    time. Calls that are pending then raise ``RunnerUnavailableError``; if the "
                "child dies, they\n"
                "    raise ``RunnerExitedError``. The thread that started the child may exit.\n"
            ),
            "May be called at any time and repeatedly; ``load`` may follow. Cancelling this task "
            "kills\n"
            "        the child at once and still reaps it.\n": (
                "May be called at any time, from any thread, and repeatedly; ``load`` may follow. "
                "An\n"
                "        interrupt during the wait kills the child at once.\n"
            ),
        },
    ),
)


def generate(pair: Pair, root: Path = ROOT) -> str:
    """Return the text of a generated file.

    Raises:
        UnknownNameError: The source has a name of asyncio without a counterpart, or lacks a
            passage of the table.
    """
    source = Path(pair.source)
    try:
        body = translate((root / source).read_text(encoding="utf-8"), pair.passages)
    except UnknownNameError as error:
        raise UnknownNameError(f"{source}: {error}") from None
    header = f"# Generated by tools/async_to_sync.py from {source.name}. Do not edit.\n"
    return _formatted(header + body, pair.target)


def translate(source: str, passages: Mapping[str, str]) -> str:
    """Return the sync form of a source text, before formatting.

    Raises:
        UnknownNameError: As for ``generate``.
    """
    if missing := [passage for passage in passages if passage not in source]:
        raise UnknownNameError(f"no passage {missing[0]!r}; update tools/async_to_sync.py")
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    edits = [*_token_edits(tokens, passages), *_parenthesis_edits(tokens)]
    return _edited(source, sorted(edits))


def _edited(source: str, edits: Sequence[_Edit]) -> str:
    lengths = (len(line) for line in io.StringIO(source))
    starts = list(itertools.accumulate(lengths, initial=0))
    parts, at = [], 0
    for (first_line, first), (last_line, last), text in edits:
        parts += [source[at : starts[first_line - 1] + first], text]
        at = starts[last_line - 1] + last
    return "".join([*parts, source[at:]])


def _token_edits(
    tokens: Sequence[tokenize.TokenInfo], passages: Mapping[str, str]
) -> Iterator[_Edit]:
    for token, following in itertools.pairwise(tokens):
        if token.type == tokenize.NAME:
            if token.string in _KEYWORDS:
                yield token.start, following.start, ""
            elif token.string in NAMES:
                yield token.start, token.end, NAMES[token.string]
            elif _ASYNC_NAME.fullmatch(token.string):
                raise UnknownNameError(
                    f"line {token.start[0]}: {token.string} has no sync counterpart; move it to a "
                    f"module written for both sides, or add it to NAMES in tools/async_to_sync.py"
                )
        elif tokenize.tok_name[token.type] in _TEXTS:
            yield token.start, token.end, _translated_text(token.string, passages)


def _translated_text(text: str, passages: Mapping[str, str]) -> str:
    """Translate a string or a comment in one pass, so that no replacement is translated again."""
    parts = [*map(re.escape, passages), rf"\b(?:{'|'.join(NAMES)})\b", _AWAITING_WORD]
    replacements = {**NAMES, **passages}
    return re.sub("|".join(parts), lambda found: replacements.get(found[0], ""), text)


def _parenthesis_edits(tokens: Sequence[tokenize.TokenInfo]) -> Iterator[_Edit]:
    """Remove the parentheses of ``(await call()).attribute``, which are redundant without await."""
    for index, token in enumerate(tokens[:-1]):
        if token.string != "(" or tokens[index + 1].string != "await" or _is_call(tokens, index):
            continue
        end = _primary_end(tokens, index + 2)
        if tokens[end].string == ")" and tokens[end + 1].string in {".", "["}:
            yield token.start, token.end, ""
            yield tokens[end].start, tokens[end].end, ""


def _is_call(tokens: Sequence[tokenize.TokenInfo], index: int) -> bool:
    before = tokens[index - 1]
    is_name = before.type == tokenize.NAME and not keyword.iskeyword(before.string)
    return is_name or before.string in _CLOSING


def _primary_end(tokens: Sequence[tokenize.TokenInfo], index: int) -> int:
    """Return the index of the first token after an expression of names, calls and subscripts."""
    depth = 0
    while True:
        token = tokens[index]
        if token.string in _CLOSING and depth == 0:
            return index
        depth += (token.string in _OPENING) - (token.string in _CLOSING)
        is_plain = token.string == "." or token.string in _OPENING | _CLOSING
        is_name = token.type == tokenize.NAME and not keyword.iskeyword(token.string)
        if depth == 0 and not is_plain and not is_name:
            return index
        index += 1


def _formatted(source: str, name: str) -> str:
    """Sort the imports, whose order follows the new names, and format as ``make format`` does."""
    options = ["--config", "pyproject.toml", "--stdin-filename", name, "-"]
    for command in (["check", "--quiet", "--fix-only", "--select", "I"], ["format", "--quiet"]):
        source = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *options],
            cwd=ROOT,
            check=True,
            input=source,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        ).stdout
    return source


def stale(pairs: Sequence[Pair] = PAIRS, root: Path = ROOT) -> dict[Path, str]:
    """Return the new text of every generated file that is missing or not up to date."""
    texts = {root / pair.target: generate(pair, root) for pair in pairs}
    return {
        file: text
        for file, text in texts.items()
        if not file.exists() or file.read_text(encoding="utf-8") != text
    }


def main(
    argv: Sequence[str] | None = None, pairs: Sequence[Pair] = PAIRS, root: Path = ROOT
) -> int:
    """Generate or check all files, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.async_to_sync", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a file is stale")
    arguments = parser.parse_args(argv)
    try:
        files = stale(pairs, root)
    except UnknownNameError as error:
        print(error, file=sys.stderr)
        return 1
    for file, text in files.items():
        if arguments.check:
            message = f"stale {file.relative_to(root)}: run 'make sync' and commit the result"
            print(message, file=sys.stderr)
        else:
            file.write_text(text, encoding="utf-8")
            print(f"wrote {file.relative_to(root)}")
    return 1 if files and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
