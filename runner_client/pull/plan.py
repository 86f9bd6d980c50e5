"""Plan of a download: files, missing bytes, and the way into the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runner_client.pull.download import fetch_into_store
from runner_client.pull.errors import PullError
from runner_client.pull.hub import Hub
from runner_client.pull.preview import build_skeleton, estimate_skeleton
from runner_client.pull.store import Store
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from runner_client.memory.estimation import MemoryEstimate
    from runner_client.pull.files import RemoteFile, Repository
    from runner_client.pull.preview import Preview
    from runner_client.types import LoadOptions

_MAIN = "main"


def planned(
    name: str, revision: str | None, cache: Path, folder: Path, endpoint: str | None = None
) -> PullPlan:
    """Read a repository without the weights.

    Args:
        name: ``org/name``.
        revision: A branch, a tag or a commit; None for the main branch.
        cache: The cache directory. Nothing is written to it before ``PullPlan.run``.
        folder: An empty directory for small files, which the plan uses until it has run.
        endpoint: URL of the hub. Default: ``HF_ENDPOINT``, or https://huggingface.co.

    Raises:
        ModelNotFoundError: The repository or the revision does not exist.
        ModelUnsupportedError: It is not that of a model that can be loaded.
        PullError: The hub refused, failed, or cannot be reached.
    """
    hub = Hub(name, revision, endpoint)
    repository = hub.repository()
    store = Store(cache, repository)
    skeleton = folder / name.replace("/", "--")
    skeleton.mkdir()
    preview = build_skeleton(hub, repository, store, skeleton)
    return PullPlan(hub, repository, store, skeleton, preview, revision or _MAIN)


class PullPlan:
    """Download of known files, before any weights are fetched.

    Args:
        hub: The hub.
        repository: The repository at one commit, which stays the same if the branch moves.
        store: The cache.
        skeleton: Directory with the small files and the headers of the weights.
        preview: The files.
        revision: The branch, tag or commit that was asked for.
    """

    def __init__(
        self,
        hub: Hub,
        repository: Repository,
        store: Store,
        skeleton: Path,
        preview: Preview,
        revision: str,
    ) -> None:
        self._hub = hub
        self._repository = repository
        self._store = store
        self._skeleton = skeleton
        self._preview = preview
        self._revision = revision

    @property
    def name(self) -> str:
        """Name of the repository."""
        return self._repository.name

    @property
    def commit(self) -> str:
        """The commit."""
        return self._repository.commit

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        """Files for a runner."""
        return self._preview.files

    @property
    def missing_bytes(self) -> int:
        """Bytes missing from the cache."""
        return sum(self._store.missing_bytes(file) for file in self.files)

    @property
    def free_bytes(self) -> int:
        """Free space of the cache's disk, in bytes."""
        return self._store.free_bytes()

    def estimate(self, load: LoadOptions) -> MemoryEstimate:
        """Estimate the model's memory.

        Raises:
            ModelUnsupportedError: mlx_lm cannot build the model.
            RunnerError: As for ``estimate``.
        """
        return estimate_skeleton(self._repository, self._skeleton, load)

    def require_disk(self) -> None:
        """Check that the missing bytes have room.

        Raises:
            PullError: They do not.
        """
        missing, free = self.missing_bytes, self.free_bytes
        if missing > free:
            raise PullError(
                f"{self.name} needs {format_bytes(missing)} more on the disk of "
                f"{self._store.folder}, which has {format_bytes(free)} free: free "
                f"{format_bytes(missing - free)}, or point HF_HUB_CACHE at another disk"
            )

    def run(self, show_percent: Callable[[int], None]) -> Path:
        """Fetch the missing bytes, verify every file, and make the snapshot visible.

        Args:
            show_percent: Function that is called with the progress.

        Returns:
            The snapshot's directory.

        Raises:
            PullError: The hub refused or failed, the disk is full, or a file is damaged.
        """
        total = sum(file.size for file in self._preview.weights) or 1
        held = total - sum(self._store.missing_bytes(file) for file in self._preview.weights)

        def on_bytes(count: int) -> None:
            nonlocal held
            held += count
            show_percent(held * 100 // total)

        for file in self._preview.texts:
            self._store.adopt(file, self._skeleton / file.name)
        for file in self._preview.weights:
            fetch_into_store(self._hub, self._store, file, self.commit, on_bytes)
        return self._store.publish(self.files, self._revision)
