"""The comparison of transcripts with real output."""

from __future__ import annotations

import pytest

from support.transcripts import Step, console_blocks, difference

DOCUMENT = """
Text.

```console
$ first | second \\
    and more
{
  "count": 1
}

$ silent
```

```sh
$ not a transcript
```
"""


def test_commands_and_outputs_are_parsed() -> None:
    steps = [Step("first | second \\\n    and more", '{\n  "count": 1\n}'), Step("silent", "")]
    assert console_blocks(DOCUMENT) == [steps]


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ("", ""),
        ("", "\n"),
        ("a b", "a b\n"),
        ("up 4 s, 7.5 MiB", "up 1,020.5 s, 900 B\n"),
        ('"device": "cpu: AMD EPYC",', '"device": "gpu: Apple M3 Max",\n'),
        ("state    active\nBLAS     none", "state  active\nBLAS   a fast one\n"),
        ("id=a701ab6fbafd6367 OK", "id=0123456789abcdef OK\n"),
        ("  1.2 [6]  |∎∎", "  11.25 [0] |\n"),
        ("first\n...\nlast", "first\nlast\n"),
        ("first\n...\nlast", "first\n2\n3\nlast\n"),
    ],
)
def test_outputs_that_vary_from_run_to_run_are_equal(expected: str, printed: str) -> None:
    assert not difference(expected, printed)


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ("", "a word\n"),
        ("a word", ""),
        ("Code: NotFound", "Code: Internal\n"),
        ('"queued_count": 1', '"running_count": 1\n'),
        ("a\nb", "a\n"),
        ("a", "a\nb\n"),
        ("first\n...\nlast", "first\nlast\nmore\n"),
        ("[OK]   64 responses", "[OK]   60 responses\n[Unavailable]   4 responses\n"),
        ("exit code 0 OK", "exit code OK\n"),
    ],
)
def test_other_outputs_differ(expected: str, printed: str) -> None:
    assert difference(expected, printed)
