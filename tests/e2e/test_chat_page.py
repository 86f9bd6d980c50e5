"""docs/chat.md: the conversation with the demo model is what it says."""

from __future__ import annotations

import shlex
import subprocess
import sysconfig
from pathlib import Path

import pytest

from support.transcripts import Step, console_blocks

pytest.importorskip("mlx_lm", reason="starts real runners: needs the server extra")

ROOT = Path(__file__).parents[2]
COMMAND = Path(sysconfig.get_path("scripts")) / "mlx-runner"
PROMPT = ">>> "
STEPS = [
    step
    for block in console_blocks((ROOT / "docs/chat.md").read_text(encoding="utf-8"))
    for step in block
    if "runner_server/demo/model" in step.command
]


def test_there_is_a_conversation_with_the_demo_model() -> None:
    assert len(STEPS) == 1
    assert STEPS[0].output.count(PROMPT) >= 3


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.command)
def test_the_answers_are_those_of_the_page(step: Step) -> None:
    lines = step.output.splitlines()
    asked = [line.removeprefix(PROMPT) for line in lines if line.startswith(PROMPT)]
    answers = [line for line in lines if not line.startswith(PROMPT)]
    program, *arguments = shlex.split(step.command)
    assert program == COMMAND.name
    done = subprocess.run(
        [COMMAND, *arguments],
        cwd=ROOT,
        input="".join(f"{text}\n" for text in asked),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == answers
