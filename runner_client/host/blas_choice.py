"""The fastest BLAS measured by ``mlx-runner doctor`` on this machine, stored between runs.

Each start reads one small file and trusts it no further than necessary: the stored choice must
be one of the libraries found now, unchanged and on the same CPU. Otherwise the choice is ignored
and the order of ``find_blas`` applies.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner_client.host.blas import cpu_facts, installed_blas, variants
from runner_common.cores import usable_cores
from runner_common.user_folders import cache_folder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from runner_client.host.blas import Blas

_FORMAT = 1
_MOST_BYTES = 64 * 1024

# x86 has a model name, on some virtual machines just the vendor, and numbers; arm64 has
# numbers of its own.
_CPU_FACTS = ("model name", "cpu family", "model", "CPU implementer", "CPU part")


@dataclass(frozen=True, slots=True)
class Choice:
    """The library measured to be the fastest.

    Attributes:
        blas: The library to preload; None for MLX's own.
    """

    blas: Blas | None


def choose_blas(environment: Mapping[str, str]) -> Blas | None:
    """Return the BLAS to preload on this Linux CPU: the fastest measured, or the preferred one.

    Args:
        environment: The runner's environment, which names the user's cache folder.
    """
    libraries = installed_blas()
    choice = recall(environment, libraries)
    return choice.blas if choice else next(iter(libraries), None)


def remember(
    environment: Mapping[str, str],
    choice: Choice,
    libraries: Sequence[Blas],
    *,
    root: Path = Path("/"),
) -> Path:
    """Store the choice for later starts, and return the path of the file.

    Args:
        environment: The environment that names the cache folder.
        choice: One of ``libraries``, or MLX's own.
        libraries: The libraries to choose from.
        root: The directory that contains ``proc``.

    Raises:
        OSError: The file cannot be written, or no cache folder is known.
    """
    path = cache_file(environment)
    if path is None:
        raise FileNotFoundError("neither XDG_CACHE_HOME nor HOME names a folder")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    record = {**_key(libraries, root), "choice": _plain(choice.blas)}
    # Another process may read or write the file, so it is replaced atomically.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        written = Path(file.name)
        try:
            json.dump(record, file, indent=2)
            file.close()
            written.replace(path)
        except BaseException:
            written.unlink(missing_ok=True)
            raise
    return path


def recall(
    environment: Mapping[str, str], libraries: Sequence[Blas], *, root: Path = Path("/")
) -> Choice | None:
    """Return the stored choice; None if absent or no longer valid.

    The arguments are those of ``remember``; ``libraries`` are the ones found now.
    """
    path = cache_file(environment)
    record = _read(path) if path else {}
    choice = record.pop("choice", None)
    if not record or record != _key(libraries, root):
        return None
    # The file's content is never used directly: it only selects one of these.
    known = (None, *variants(libraries))
    return next((Choice(blas) for blas in known if _plain(blas) == choice), None)


def cache_file(environment: Mapping[str, str]) -> Path | None:
    """Return the path of the stored choice; None if the environment names no cache folder."""
    folder = cache_folder(environment)
    return folder / "mlx-runner" / "blas.json" if folder else None


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty unless this is a small regular file with one."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= _MOST_BYTES:
            record = json.loads(path.read_text(encoding="utf-8"))
            return record if isinstance(record, dict) else {}
    return {}


def _key(libraries: Sequence[Blas], root: Path) -> dict[str, Any]:
    """Return the facts under which a choice is valid: the CPU, the cores and the libraries."""
    facts = cpu_facts(root)
    return {
        "format": _FORMAT,
        "cpu": [facts.get(name, "") for name in _CPU_FACTS],
        "cores": usable_cores().count,
        "libraries": [_identity(blas.path) for blas in libraries],
    }


def _identity(path: Path) -> list[Any]:
    """Return path, size and modification time, which identify a version of a file."""
    try:
        status = path.stat()
    except OSError:
        return [str(path)]
    return [str(path), status.st_size, status.st_mtime_ns]


def _plain(blas: Blas | None) -> dict[str, Any]:
    return {} if blas is None else {"path": str(blas.path), "env": dict(blas.env)}
