"""Folders no other user can change, and folders refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runner_server.host.private_folder import UntrustedFolderError, private_folder

OTHER_USER = 60001
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def test_a_new_folder_is_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = private_folder(tmp_path / "new")
    finally:
        os.umask(before)
    assert (folder.stat().st_mode & 0o7777, folder.stat().st_uid) == (0o700, os.geteuid())
    assert private_folder(tmp_path / "new") == folder


def test_missing_parents_are_created(tmp_path: Path) -> None:
    assert private_folder(tmp_path / "a/b/c").is_dir()


@needs_root
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o700)
    os.chown(folder, OTHER_USER, OTHER_USER)
    with pytest.raises(UntrustedFolderError, match=f"belongs to user {OTHER_USER}"):
        private_folder(folder)


@needs_root
def test_nothing_is_created_below_a_folder_of_another_user(tmp_path: Path) -> None:
    """As root with another user's HOME, folders made there would be useless to their owner."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    os.chown(home, OTHER_USER, OTHER_USER)
    with pytest.raises(UntrustedFolderError, match=f"belongs to user {OTHER_USER}"):
        private_folder(home / ".cache" / "kernels")
    assert not list(home.iterdir())


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707, 0o755])
def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(UntrustedFolderError, match=f"mode {mode:04o}"):
        private_folder(folder)


def test_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(UntrustedFolderError, match="is a link"):
        private_folder(tmp_path / "link")


def test_a_link_above_is_resolved_once(tmp_path: Path) -> None:
    """Return the checked path, wherever the link leads later."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert private_folder(tmp_path / "link" / "own") == (tmp_path / "real/own").resolve()


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="exists"):
        private_folder(tmp_path / "file")
    with pytest.raises(NotADirectoryError):
        private_folder(tmp_path / "file" / "below")


@pytest.mark.parametrize(("mode", "is_safe"), [(0o1777, True), (0o777, False), (0o775, False)])
def test_others_may_write_to_a_parent_only_if_it_is_sticky(
    tmp_path: Path, mode: int, is_safe: bool
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "own").mkdir(mode=0o700)
    shared.chmod(mode)
    if is_safe:
        assert private_folder(shared / "own") == shared.resolve() / "own"
    else:
        with pytest.raises(UntrustedFolderError, match=f"write to .*shared .mode {mode:04o}"):
            private_folder(shared / "own")
