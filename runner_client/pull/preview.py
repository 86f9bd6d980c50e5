"""Estimate of a remote model from small files and headers.

A temporary directory gets the model's configuration, tokenizer and templates, and of each weight
file the header, in a sparse file of the right size. Gate and server read such a directory as they
read the model itself, so the estimate is that of the downloaded model.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from runner_client.errors import InsufficientMemoryError, ModelUnsupportedError
from runner_client.memory.estimation import MemoryEstimate, estimate
from runner_client.memory.model import read_model
from runner_client.pull.download import fetch, is_intact
from runner_client.pull.files import candidates

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from runner_client.pull.files import RemoteFile, Repository
    from runner_client.pull.hub import Hub
    from runner_client.pull.store import Store
    from runner_client.types import LoadOptions

_FIRST_BYTES = 100_000
"""First request for a header. Longer headers take a second one."""

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class Preview:
    """A model on the hub, in the form for a runner.

    Attributes:
        texts: Its small files, which are in the skeleton.
        weights: Its weight files.
    """

    texts: tuple[RemoteFile, ...]
    weights: tuple[RemoteFile, ...]

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        """All files."""
        return (*self.texts, *self.weights)


def build_skeleton(hub: Hub, repository: Repository, store: Store, skeleton: Path) -> Preview:
    """Fetch the small files and the headers into an empty directory.

    Raises:
        ModelUnsupportedError: The repository is not that of a model that can be loaded.
        PullError: The hub refused or failed.
    """
    found = candidates(repository)
    for file in found.texts:
        path = skeleton / file.name
        path.parent.mkdir(exist_ok=True)
        if store.has(file) and is_intact(file, store.blob(file)):
            path.symlink_to(store.blob(file))
        else:
            fetch(hub, file, repository.commit, path, _ignore)
    for file in found.weights:
        _write_header(hub, file, repository.commit, skeleton / file.name)
    with _named(repository.name, skeleton):
        chosen = {path.name for path in read_model(skeleton).weight_files}
    return Preview(found.texts, tuple(file for file in found.weights if file.name in chosen))


def estimate_skeleton(repository: Repository, skeleton: Path, load: LoadOptions) -> MemoryEstimate:
    """Estimate the memory of the model in a skeleton; see ``estimate``.

    Raises:
        RunnerError: As for ``estimate``.
    """
    with _named(repository.name, skeleton):
        need = estimate(str(skeleton), options=load)
    notes = tuple(note.replace(str(skeleton), repository.name) for note in need.notes)
    return replace(need, model=repository.name, path=repository.name, notes=notes)


def _write_header(hub: Hub, file: RemoteFile, commit: str, path: Path) -> None:
    first = hub.read(file, commit, 0, min(_FIRST_BYTES, file.size))
    length = int.from_bytes(first[:_LENGTH_BYTES], "little")
    end = min(_LENGTH_BYTES + min(length, _MAX_HEADER_BYTES), file.size)
    rest = hub.read(file, commit, len(first), end) if end > len(first) else b""
    with path.open("wb") as out:
        out.write(first + rest)
        out.truncate(file.size)


@contextmanager
def _named(name: str, skeleton: Path) -> Iterator[None]:
    """Name the repository instead of the temporary directory in errors."""
    try:
        yield
    except ModelUnsupportedError as error:
        text = str(error).replace(str(skeleton), name)
        raise ModelUnsupportedError(text, model=name, reason=error.reason) from error
    except InsufficientMemoryError as error:
        error.args = (str(error).replace(str(skeleton), name),)
        raise


def _ignore(_count: int) -> None:
    """Show no progress of the small files."""
