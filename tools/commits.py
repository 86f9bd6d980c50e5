"""Check the commit messages since the last tag: ``python -m tools.commits [BASE]``.

Subjects are imperative and have at most 72 characters; a blank line separates the body.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

MAX_SUBJECT_CHARS = 72

_LATEST = 50
"""Commits that are checked in a repository without tags."""

_NOT_IMPERATIVE = re.compile(
    r"^(?!(?:Feed|Need|Embed|Bring|Seed|Shed|Ring|String)\b)\w+(?:ed|ing)\b"
)


def problems(message: str) -> Iterator[str]:
    """Yield the rules that a commit message breaks."""
    subject, _, rest = message.partition("\n")
    if len(subject) > MAX_SUBJECT_CHARS:
        yield f"the subject has {len(subject)} characters; at most {MAX_SUBJECT_CHARS}"
    if not subject[:1].isupper():
        yield "the subject does not begin with a capital letter"
    if subject.endswith("."):
        yield "the subject ends with a period"
    if _NOT_IMPERATIVE.match(subject):
        yield "the subject is not imperative"
    if rest and not rest.startswith("\n"):
        yield "no blank line follows the subject"


def main(arguments: Sequence[str]) -> int:
    """Check the commits of this repository; return 1 if one breaks a rule."""
    if not _git("rev-parse", "--git-dir", check=False):
        print("not a git checkout: no commits to check")
        return 0
    found = 0
    for commit in _commits(arguments[0] if arguments else ""):
        message = _git("log", "-1", "--format=%B", commit).strip()
        for problem in problems(message):
            print(f"{commit[:9]} {message.partition(chr(10))[0]!r}: {problem}", file=sys.stderr)
            found += 1
    return 1 if found else 0


def _commits(base: str) -> list[str]:
    tag = base or _git("describe", "--tags", "--abbrev=0", check=False).strip()
    limit = [f"{tag}..HEAD"] if tag else [f"--max-count={_LATEST}", "HEAD"]
    return _git("rev-list", "--no-merges", *limit).split()


def _git(*arguments: str, check: bool = True) -> str:
    git = shutil.which("git") or "git"
    return subprocess.run([git, *arguments], capture_output=True, text=True, check=check).stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
