"""Folders for the kernels that MLX compiles and loads: this user's alone.

MLX takes a kernel from ``<TMPDIR>/mlx/<version>/cpu`` if a file of its name is there, whoever
wrote it and whether it is complete (mlx/backend/cpu/compiled.cpp), and writes new ones there in
place, without a lock. So each process gets a folder of its own, which begins with links to the
kernels that earlier processes of this user have loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from runner_common.user_folders import cache_folder
from runner_server.host.private_folder import private_folder

logger = logging.getLogger(__name__)

_PREFIX = "mlx-runner-kernels-"
_IN_CACHE = Path("mlx-runner/kernels")
_RUN, _NEW_RUN = "run-", "new-"
_LIBRARIES = "lib*.so"

_UNQUOTABLE = frozenset('"$`\\\n')
"""MLX hands paths to a shell, between double quotes."""

_PTX_VARIABLE = "MLX_PTX_CACHE_DIR"
"""Where MLX keeps the kernels of CUDA; by default below TMPDIR, with the same trust."""

_NOWHERE = "/dev/null/mlx"
"""A folder that cannot be made: MLX keeps no PTX then."""


class NoKernelFolderError(OSError):
    """No folder of this user can hold kernels; says why for each that was tried."""


class KernelFolder:
    """The kernels of this process, of which complete ones are kept for later processes.

    ``keep`` and ``close`` must run on the thread that evaluates, while nothing is evaluated.

    Args:
        base: A private folder that all processes of this user share.
        version: MLX's version.
        key: Names the kernels that can replace each other; None keeps none of them.
        is_temporary: Whether to remove ``base`` at the end.

    Attributes:
        libraries: Where MLX looks for libraries while the folder is in use.
    """

    def __init__(
        self, base: Path, version: str, key: str | None, *, is_temporary: bool = False
    ) -> None:
        if _UNQUOTABLE & set(str(base)):
            raise OSError(f"{base} has a character that a shell would interpret")
        self._base, self._is_temporary = base, is_temporary
        self._kept = base / key if key else None
        _remove_dead(base)
        self._run, self._lock = _new_run(base)
        self.libraries = self._run / "mlx" / version / "cpu"
        self.libraries.mkdir(parents=True)
        self._known: set[str] = set()
        if self._kept:
            self._take_over(self._kept)

    def use(self) -> None:
        """Have MLX compile here from now on.

        Only the environment of C changes, not ``os.environ``: temporary files of Python and
        of child processes stay where they were.
        """
        os.putenv("TMPDIR", str(self._run))
        if _PTX_VARIABLE not in os.environ:
            os.putenv(_PTX_VARIABLE, str((self._kept or self._run) / "ptx"))

    def keep(self) -> None:
        """Keep new kernels for later processes, and drop those that could not be loaded."""
        if self._kept is None:
            return
        for file in self.libraries.glob(_LIBRARIES):
            if file.name not in self._known:
                # Best effort: on a full disk the next process compiles it again.
                with contextlib.suppress(OSError):
                    self._keep(file, self._kept)

    def close(self) -> None:
        """Keep what is new, and remove the folder."""
        self.keep()
        for variable in ("TMPDIR", _PTX_VARIABLE):
            _restore(variable)
        shutil.rmtree(self._base if self._is_temporary else self._run, ignore_errors=True)
        os.close(self._lock)

    def _take_over(self, kept: Path) -> None:
        for file in kept.glob(f"*/{_LIBRARIES}"):
            if _digest(file) == file.parent.name:
                _link(file, self.libraries / file.name)
                self._known.add(file.name)
            else:
                logger.info("the kernel %s is damaged; it is compiled again", file.name)
                shutil.rmtree(file.parent, ignore_errors=True)

    def _keep(self, file: Path, kept: Path) -> None:
        if not _is_loaded(file):
            file.unlink()
            return
        place = kept / _digest(file)
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        _link(file, place / file.name)
        self._known.add(file.name)


def open_kernels(
    version: str,
    *,
    check: Callable[[Path], None],
    keeps: bool = True,
    environ: Mapping[str, str] = os.environ,
) -> KernelFolder:
    """Open a folder for kernels in the first place that is fit for it.

    Args:
        version: MLX's version.
        check: Raises OSError if a folder is not fit for libraries that are executed.
        keeps: Begin with the kernels of earlier processes, and keep new ones.
        environ: Says where temporary and cached files go.

    Raises:
        NoKernelFolderError: No place is fit.
    """
    key = _key(version) if keeps else None
    reasons = []
    for place, is_temporary in _places(environ):
        folder = None
        try:
            folder = KernelFolder(private_folder(place), version, key, is_temporary=is_temporary)
            check(folder.libraries)
        except OSError as error:
            reasons.append(str(error))
        except BaseException:
            if folder:
                folder.close()
            raise
        else:
            return folder
        if folder:
            folder.close()
    raise NoKernelFolderError("; ".join(reasons))


def keep_nothing() -> None:
    """Have MLX keep no kernels of a GPU, where no folder is fit for them."""
    if _PTX_VARIABLE not in os.environ:
        os.putenv(_PTX_VARIABLE, _NOWHERE)


def _places(environ: Mapping[str, str]) -> Iterator[tuple[Path, bool]]:
    """Yield the folders to try, and whether each is made for this process alone."""
    name = f"{_PREFIX}{os.geteuid()}"
    if given := environ.get("TMPDIR"):
        yield Path(given).absolute() / name, False
    if cache := cache_folder(environ):
        yield cache / _IN_CACHE, False
    with contextlib.suppress(OSError):
        yield Path(tempfile.gettempdir()) / name, False
        yield Path(tempfile.mkdtemp(prefix=_PREFIX)), True


def _key(version: str) -> str:
    """Return a name that changes with whatever makes a kernel of another machine unusable."""
    compiler = shutil.which("g++")
    facts = [version, platform.machine(), *_cpu_features(), _c_library()]
    if compiler:
        status = Path(compiler).stat()
        facts += [os.path.realpath(compiler), str(status.st_size), str(status.st_mtime_ns)]
    return f"{version}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"


def _c_library() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, OSError, ValueError):
        return ""


def _cpu_features() -> list[str]:
    """Return those CPU features that MLX compiles for where they are there."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return sorted({"avx2", "fma", "f16c"}.intersection(flags))


def _new_run(base: Path) -> tuple[Path, int]:
    """Make a folder for this process, locked from the moment on when others can find it."""
    made = Path(tempfile.mkdtemp(prefix=_NEW_RUN, dir=base))
    lock = os.open(made / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    # File systems without locks: what a killed process leaves stays there.
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return made.rename(base / made.name.replace(_NEW_RUN, _RUN, 1)), lock


def _remove_dead(base: Path) -> None:
    """Remove the folders of processes that were killed."""
    for run in base.glob(f"{_RUN}*"):
        with contextlib.suppress(OSError):
            lock = os.open(run / "lock", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(run, ignore_errors=True)
            finally:
                os.close(lock)


def _is_loaded(library: Path) -> bool:
    """Return whether this process has loaded a library, and so found it complete."""
    try:
        ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    return True


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:32]


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; copy it where the file system has one name only."""
    if target.exists():
        return
    try:
        target.hardlink_to(source)
    except FileExistsError:
        return
    except OSError:
        shutil.copyfile(source, target)


def _restore(variable: str) -> None:
    if variable in os.environ:
        os.putenv(variable, os.environ[variable])
    else:
        os.unsetenv(variable)
