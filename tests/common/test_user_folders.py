"""The user's cache folder, chosen by environment variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner_common.memory.need_query import NeedRefusedError, NeedRequest, ask_need
from runner_common.user_folders import cache_folder


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"XDG_CACHE_HOME": "/cache", "HOME": "/home/a"}, Path("/cache")),
        ({"HOME": "/home/a"}, Path("/home/a/.cache")),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/a"}, Path("/home/a/.cache")),
        ({"XDG_CACHE_HOME": "$HOME/cache", "HOME": "/home/a"}, Path("/home/a/.cache")),
        ({"XDG_CACHE_HOME": "relative"}, None),
        ({}, None),
    ],
)
def test_only_absolute_paths_are_used(environ: dict[str, str], folder: Path | None) -> None:
    assert cache_folder(environ) == folder


@pytest.mark.parametrize("environ", [{}, {"XDG_CACHE_HOME": "$HOME/cache"}])
def test_an_estimate_without_a_cache_folder_leaves_nothing_in_the_working_directory(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refusal = {"reason": "MODEL_NOT_FOUND", "message": "none", "metadata": {}, "violations": []}
    monkeypatch.setattr("runner_common.memory.need_query._run", lambda *_: refusal)
    with pytest.raises(NeedRefusedError, match="none"):
        ask_need(NeedRequest("model"), environ)
    assert not list(tmp_path.iterdir())
