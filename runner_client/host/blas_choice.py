"""The BLAS that ``mlx-runner doctor`` found fastest on this machine, and its memory of that.

A start reads one small file and believes it only as far as it may: what it names
must be one of the libraries found now, unchanged, on the same CPU. Else it counts
for nothing, and the order of ``find_blas`` holds.
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

# x86 names the model, on virtual machines sometimes with the maker's name only, and
# numbers it; arm64 has numbers of its own.
_CPU_FACTS = ("model name", "cpu family", "model", "CPU implementer", "CPU part")


@dataclass(frozen=True, slots=True)
class Choice:
    """What was measured to be the fastest.

    Attributes:
        blas: The library to put in front; None for MLX's own.
    """

    blas: Blas | None


def choose_blas(environment: Mapping[str, str]) -> Blas | None:
    """The BLAS to put in front on this Linux CPU: the fastest by measurement, else by rule.

    Args:
        environment: Of the runner; says where the cache folder of its user is.
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
    """Writes the choice down for the starts to come; returns where.

    Args:
        environment: Says where the cache folder is.
        choice: One of ``libraries``, or MLX's own.
        libraries: All that it was chosen from.
        root: The directory that holds ``proc``.

    Raises:
        OSError: The file cannot be written, or there is no cache folder.
    """
    place = cache_file(environment)
    if place is None:
        raise FileNotFoundError("neither XDG_CACHE_HOME nor HOME names a folder")
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    record = {**_key(libraries, root), "choice": _plain(choice.blas)}
    # Another process may read it, or write it too: it is there as a whole or not at all.
    with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False) as file:
        written = Path(file.name)
        try:
            json.dump(record, file, indent=2)
            file.close()
            written.replace(place)
        except BaseException:
            written.unlink(missing_ok=True)
            raise
    return place


def recall(
    environment: Mapping[str, str], libraries: Sequence[Blas], *, root: Path = Path("/")
) -> Choice | None:
    """The choice written down; None if there is none that holds here and now.

    Arguments are ``remember``'s; ``libraries`` are those found now.
    """
    place = cache_file(environment)
    record = _read(place) if place else {}
    choice = record.pop("choice", None)
    if not record or record != _key(libraries, root):
        return None
    # Of what the file says nothing is used: it only points at one of these.
    known = (None, *variants(libraries))
    return next((Choice(blas) for blas in known if _plain(blas) == choice), None)


def cache_file(environment: Mapping[str, str]) -> Path | None:
    """Return where the choice is kept; None if the environment names no folder for it."""
    folder = cache_folder(environment)
    return folder / "mlx-runner" / "blas.json" if folder else None


def _read(place: Path) -> dict[str, Any]:
    """The object in a file; empty if it is no small regular file with one in it."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if place.is_file() and place.stat().st_size <= _MOST_BYTES:
            record = json.loads(place.read_text(encoding="utf-8"))
            return record if isinstance(record, dict) else {}
    return {}


def _key(libraries: Sequence[Blas], root: Path) -> dict[str, Any]:
    """Return what must not have changed: the CPU, the cores, and all libraries found."""
    facts = cpu_facts(root)
    return {
        "format": _FORMAT,
        "cpu": [facts.get(name, "") for name in _CPU_FACTS],
        "cores": usable_cores().count,
        "libraries": [_identity(blas.path) for blas in libraries],
    }


def _identity(path: Path) -> list[Any]:
    """Changes with the file; of one that has just gone, no other is the same."""
    try:
        status = path.stat()
    except OSError:
        return [str(path)]
    return [str(path), status.st_size, status.st_mtime_ns]


def _plain(blas: Blas | None) -> dict[str, Any]:
    return {} if blas is None else {"path": str(blas.path), "env": dict(blas.env)}
