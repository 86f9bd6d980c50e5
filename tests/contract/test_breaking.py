"""Breaking changes of the protocol are reported against proto/baseline.txtpb."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BREAKS = 100
"""Exit code of buf for breaking changes."""


def buf_breaking(tmp_path: Path, old: str = "", new: str = "") -> subprocess.CompletedProcess[str]:
    """Run buf's check on a copy of the protocol with one text replaced."""
    shutil.copytree(ROOT / "proto", tmp_path / "proto", ignore=shutil.ignore_patterns("*.py*"))
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    proto = tmp_path / "proto/mlxrunner/v1/runner.proto"
    text = proto.read_text(encoding="utf-8")
    assert old in text
    proto.write_text(text.replace(old, new, 1), encoding="utf-8")
    buf = Path(sys.executable).parent / "buf"
    return subprocess.run(
        [buf, "breaking", "--against", "proto/baseline.txtpb"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_protocol_does_not_break_the_baseline(tmp_path: Path) -> None:
    done = buf_breaking(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("old", "new", "report"),
    [
        ("  int32 queued_count = 9;\n", "", 'field "9" with name "queued_count"'),
        (
            "  int32 queued_count = 9;\n",
            '  reserved 9;\n  reserved "queued_count";\n',
            'field "9" with name',
        ),
        ("int32 queued_count = 9;", "int64 queued_count = 9;", 'Field "9"'),
        ("int32 queued_count = 9;", "int32 waiting_count = 9;", '"waiting_count"'),
        ("  ERROR_REASON_BUSY = 6;\n", "", 'enum value "6"'),
        ("(stream CompletionResponse)", "(CompletionResponse)", '"Completion"'),
        ("  rpc Detokenize(DetokenizeRequest) returns (DetokenizeResponse);\n", "", "Detokenize"),
    ],
    ids=["removed", "reserved", "type", "name", "enum value", "streaming", "rpc"],
)
def test_a_breaking_change_is_reported(tmp_path: Path, old: str, new: str, report: str) -> None:
    done = buf_breaking(tmp_path, old, new)
    assert done.returncode == BREAKS, done.stdout + done.stderr
    assert report in done.stdout


def test_an_addition_is_not_breaking(tmp_path: Path) -> None:
    field = "  int32 queued_count = 9;\n"
    done = buf_breaking(
        tmp_path, field, f"{field}  // Something new.\n  int32 something_new = 9999;\n"
    )
    assert done.returncode == 0, done.stdout + done.stderr
