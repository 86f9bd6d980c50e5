"""Folder of a repository in the cache of huggingface_hub.

See https://huggingface.co/docs/huggingface_hub/guides/manage-cache: ``blobs`` has the files under
their digests, ``snapshots`` a folder of links per commit, ``refs`` the commit of each branch.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.utils import WeakFileLock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runner_client.pull.files import RemoteFile, Repository


class Store:
    """The folder of one repository, at one commit.

    Args:
        cache: The cache directory.
        repository: The repository.
    """

    def __init__(self, cache: Path, repository: Repository) -> None:
        name = f"models--{repository.name.replace('/', '--')}"
        self._folder = cache / name
        self._locks = cache / ".locks" / name
        self._commit = repository.commit

    @property
    def folder(self) -> Path:
        """The folder, which may not exist."""
        return self._folder

    @property
    def snapshot(self) -> Path:
        """The folder with the model's files."""
        return self._folder / "snapshots" / self._commit

    def blob(self, file: RemoteFile) -> Path:
        """Return where a complete file is."""
        return self._folder / "blobs" / file.digest

    def partial(self, file: RemoteFile) -> Path:
        """Return where an incomplete file is."""
        return self._folder / "blobs" / f"{file.digest}.incomplete"

    def has(self, file: RemoteFile) -> bool:
        """Return whether a file has the full size."""
        return _size(self.blob(file)) == file.size

    def missing_bytes(self, file: RemoteFile) -> int:
        """Return how many bytes of a file are not in the cache yet."""
        if self.has(file):
            return 0
        held = _size(self.partial(file))
        return file.size - held if 0 <= held <= file.size else file.size

    def free_bytes(self) -> int:
        """Return the free space on the disk of the cache."""
        folder = next(path for path in (self._folder, *self._folder.parents) if path.exists())
        return shutil.disk_usage(folder).free

    @contextmanager
    def locked(self, file: RemoteFile) -> Iterator[None]:
        """Keep other processes, huggingface_hub's own included, from fetching the same file."""
        self._locks.mkdir(parents=True, exist_ok=True)
        self.blob(file).parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(self._locks / f"{file.digest}.lock"):
            yield

    def adopt(self, file: RemoteFile, content: Path) -> None:
        """Copy a complete and verified file into the cache, unless the cache has the same one."""
        with self.locked(file):
            # The content is verified; the copy in the cache may be damaged.
            if not (self.has(file) and content.samefile(self.blob(file))):
                shutil.copyfile(content, self.partial(file))
                self.complete(file)

    def complete(self, file: RemoteFile) -> None:
        """Turn a verified partial file into a complete one."""
        self.partial(file).replace(self.blob(file))

    def publish(self, files: tuple[RemoteFile, ...], revision: str) -> Path:
        """Make a complete snapshot visible under its commit and its revision.

        The revision points to the commit only from now on, so that until then a complete
        earlier snapshot stays in use.

        Args:
            files: All files of the snapshot, each complete.
            revision: The branch, tag or commit that was asked for.

        Returns:
            The snapshot.
        """
        for file in files:
            self._link(file)
        if revision != self._commit:
            self._point(self._folder / "refs" / revision)
        return self.snapshot

    def _link(self, file: RemoteFile) -> None:
        link = self.snapshot / file.name
        depth = len(Path(file.name).parts) + 1
        target = Path(*[".."] * depth, "blobs", file.digest)
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink() and link.readlink() == target:
            return
        link.unlink(missing_ok=True)
        link.symlink_to(target)

    def _point(self, ref: Path) -> None:
        ref.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self._folder, delete=False) as file:
            file.write(self._commit)
        Path(file.name).replace(ref)


def _size(path: Path) -> int:
    """Return the size of a file; -1 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
