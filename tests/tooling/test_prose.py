"""Figures and exit code of ``tools.prose``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import prose
from tools.prose import Measurement, main, measure, python_files

PLAIN = '''"""Cache of tokens."""

def evict() -> None:
    """Evict the least recently used entry."""
'''
"""Two summaries without findings."""

ODD = '''"""What a cache holds."""

LIMIT = 8
"""So many entries, and so much of each."""

def evict() -> None:
    """Evict it."""
    # Nobody reads this entry again.
'''
"""One summary that opens with a clause, one with a pronoun, and three idioms."""


def _measured(source: str) -> Measurement:
    measurement = Measurement()
    measurement.add(Path("cache.py"), source)
    return measurement


def _write(folder: Path, name: str, source: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source, encoding="utf-8")
    return file


def test_plain_prose_is_within_the_limits() -> None:
    measurement = _measured(PLAIN)
    assert measurement.summaries == 2
    assert measurement.words == 3 + 6
    assert (measurement.opens, measurement.leans, measurement.idioms) == (0, 0, 0)
    assert measurement.is_within_limits


def test_odd_prose_is_above_the_limits() -> None:
    measurement = _measured(ODD)
    assert (measurement.opens, measurement.leans) == (0.5, 0.5)
    assert measurement.idioms == pytest.approx(1000 * 3 / measurement.words)
    assert not measurement.is_within_limits


def test_findings_name_file_line_and_kind() -> None:
    assert [str(finding).strip() for finding in _measured(ODD).findings] == [
        "cache.py:1: opens: What a cache holds.",
        "cache.py:7: leans: Evict it.",
        "cache.py:1: clause as a noun: What a",
        "cache.py:4: vague quantity: so much",
        "cache.py:8: indefinite person: Nobody",
    ]


@pytest.mark.parametrize(
    "summary",
    ["Whatever", "Allocate a slot.", "Sort entries.", "Item of a page.", "Thatch a roof."],
)
def test_words_that_only_start_like_a_pronoun_do_not_count(summary: str) -> None:
    assert _measured(f'"""{summary}"""').findings == []


@pytest.mark.parametrize(
    ("passage", "kind"),
    [
        ("there is no longer a copy", None),
        ("this is no copy", "negation of a noun"),
        ("so many that they collide", None),
        ("so many copies", "vague quantity"),
        ("it was to be copied", "obligation"),
        ("the caller is told", "informed object"),
    ],
)
def test_idioms_are_found_in_comments(passage: str, kind: str | None) -> None:
    kinds = [finding.kind for finding in _measured(f"x = 1  # {passage}\n").findings]
    assert kinds == ([kind] if kind else [])


def test_strings_and_code_do_not_count() -> None:
    measurement = _measured('message = "What it is, nobody is told"\n')
    assert (measurement.words, measurement.findings) == (0, [])


def test_an_empty_file_is_within_the_limits() -> None:
    assert _measured("").is_within_limits


@pytest.mark.parametrize(("figure", "limit"), [("opens", 0.5), ("leans", 0.5), ("idioms", 1000)])
def test_a_figure_at_the_limit_passes(
    monkeypatch: pytest.MonkeyPatch, figure: str, limit: float
) -> None:
    for name in ("opens", "leans", "idioms"):
        monkeypatch.setattr(prose, f"MAX_{name.upper()}", 1000)
    monkeypatch.setattr(prose, f"MAX_{figure.upper()}", limit)
    assert _measured(ODD).is_within_limits
    monkeypatch.setattr(prose, f"MAX_{figure.upper()}", 0.01)
    assert not _measured(ODD).is_within_limits


def test_build_outputs_and_stubs_are_skipped(tmp_path: Path) -> None:
    wanted = _write(tmp_path, "room/cache.py", PLAIN)
    for name in ("room/cache_pb2.py", "node_modules/a.py", ".venv/a.py", "room/notes.txt"):
        _write(tmp_path, name, PLAIN)
    assert python_files(tmp_path) == [wanted]
    assert python_files(wanted) == [wanted]
    assert measure(python_files(tmp_path)).summaries == 2


def test_a_path_above_the_limits_fails_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd, plain = _write(tmp_path, "odd.py", ODD), _write(tmp_path, "plain.py", PLAIN)
    assert main([str(plain)]) == 0
    assert main([str(odd), str(plain)]) == 1
    first, above, within = capsys.readouterr().out.splitlines()
    assert first == within
    assert within.endswith(
        ": 2 summaries, 0% open with a clause, 0% contain a pronoun; "
        "0.0 idioms per 1,000 words of 9"
    )
    assert above.endswith("ABOVE LIMIT")


def test_a_missing_path_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "missing")])
    assert "no such file or directory" in capsys.readouterr().err


def test_the_findings_are_listed_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = _write(tmp_path, "odd.py", ODD)
    main([str(odd), "--show"])
    assert f"  {odd}:7: leans: Evict it." in capsys.readouterr().out.splitlines()
