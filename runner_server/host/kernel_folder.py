"""Private folders for the kernels that MLX compiles and loads.

MLX loads a kernel from ``<TMPDIR>/mlx/<version>/cpu`` if a file with its name exists, whoever wrote
that file and even if it is incomplete (mlx/backend/cpu/compiled.cpp). It writes new ones in place,
without a lock. Each process therefore gets a separate folder, which starts with links to the
kernels that earlier processes of the same user have loaded.
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
IN_CACHE = Path("mlx-runner/kernels")
"""Path below the user's cache folder."""

_RUN, _NEW_RUN = "run-", "new-"
_LIBRARIES = "lib*.so"

_UNQUOTABLE = frozenset('"$`\\\n')
"""Characters not allowed in paths, because MLX passes paths to a shell in double quotes."""

_PTX_VARIABLE = "MLX_PTX_CACHE_DIR"
"""Variable with the folder of MLX's CUDA kernels. Its default is below TMPDIR, where MLX trusts any
file too."""

_NOWHERE = "/dev/null/mlx"
"""A folder that cannot be created, so that MLX stores no PTX."""


class NoKernelFolderError(OSError):
    """No folder is usable for kernels. The message has the reason for each folder tried."""


class KernelFolder:
    """Folder of this process's kernels, which keeps complete ones for later processes.

    Call ``keep`` and ``close`` on the thread that evaluates arrays, and not during an evaluation.

    Args:
        base: Private folder shared by all processes of this user.
        version: MLX's version.
        key: Name of the set of interchangeable kernels; None to share none with other processes.
        is_temporary: Whether to remove ``base`` on ``close``.

    Attributes:
        libraries: Folder in which MLX looks for compiled kernels once :meth:`use` is called.

    Raises:
        OSError: The base has a character that a shell would interpret, or cannot be written.
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
        """Make MLX compile and load kernels in this folder.

        Changes the C environment but not ``os.environ``, so that temporary files of Python and of
        child processes are not affected.
        """
        os.putenv("TMPDIR", str(self._run))
        if _PTX_VARIABLE not in os.environ:
            os.putenv(_PTX_VARIABLE, str((self._kept or self._run) / "ptx"))

    def keep(self) -> None:
        """Keep new kernels for later processes, and delete those that were not loaded."""
        if self._kept is None:
            return
        for file in self.libraries.glob(_LIBRARIES):
            if file.name not in self._known:
                # Best effort: if it fails, the next process compiles the kernel again.
                with contextlib.suppress(OSError):
                    self._keep(file, self._kept)

    def close(self) -> None:
        """Keep new kernels and remove the folder."""
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
                logger.info("the kernel %s is damaged and will be compiled again", file.name)
                shutil.rmtree(file.parent, ignore_errors=True)

    def _keep(self, file: Path, kept: Path) -> None:
        if not _is_loaded(file):
            file.unlink()
            return
        target = kept / _digest(file)
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        _link(file, target / file.name)
        self._known.add(file.name)


def open_kernels(
    version: str,
    *,
    check: Callable[[Path], None],
    keeps: bool = True,
    environ: Mapping[str, str] = os.environ,
) -> KernelFolder:
    """Open a kernel folder in the first suitable location.

    Args:
        version: MLX's version.
        check: Called with the folder of each location; raises OSError if it is unsuitable. Any
            other exception is passed on.
        keeps: Whether to start with the kernels of earlier processes and to keep new ones.
        environ: Environment with the folders of temporary and cached files.

    Raises:
        NoKernelFolderError: No location is suitable.
    """
    key = kernel_set(version) if keeps else None
    reasons = []
    for path, is_temporary in _candidates(environ):
        folder = None
        try:
            folder = KernelFolder(private_folder(path), version, key, is_temporary=is_temporary)
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


def kernel_set(version: str) -> str:
    """Return the name of the set of kernels that processes on this machine can share.

    Args:
        version: MLX's version.
    """
    compiler = shutil.which("g++")
    facts = [version, platform.machine(), *_cpu_features(), _c_library()]
    if compiler:
        status = Path(compiler).stat()
        facts += [os.path.realpath(compiler), str(status.st_size), str(status.st_mtime_ns)]
    return f"{version}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"


def keep_nothing() -> None:
    """Keep MLX from storing GPU kernels, for lack of a suitable folder."""
    if _PTX_VARIABLE not in os.environ:
        os.putenv(_PTX_VARIABLE, _NOWHERE)


def _candidates(environ: Mapping[str, str]) -> Iterator[tuple[Path, bool]]:
    """Yield the folders to try, each with True if it is for this process only."""
    name = f"{_PREFIX}{os.geteuid()}"
    if given := environ.get("TMPDIR"):
        yield Path(given).absolute() / name, False
    if cache := cache_folder(environ):
        yield cache / IN_CACHE, False
    with contextlib.suppress(OSError):
        yield Path(tempfile.gettempdir()) / name, False
        yield Path(tempfile.mkdtemp(prefix=_PREFIX)), True


def _c_library() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, OSError, ValueError):
        return ""


def _cpu_features() -> list[str]:
    """Return the CPU's features, limited to those MLX compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return sorted({"avx2", "fma", "f16c"}.intersection(flags))


def _new_run(base: Path) -> tuple[Path, int]:
    """Create a folder for this process, locked before other processes can find it."""
    made = Path(tempfile.mkdtemp(prefix=_NEW_RUN, dir=base))
    lock = os.open(made / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    # On file systems without locks the folders of killed processes stay.
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return made.rename(base / made.name.replace(_NEW_RUN, _RUN, 1)), lock


def _remove_dead(base: Path) -> None:
    """Remove the folders of killed processes."""
    for run in base.glob(f"{_RUN}*"):
        with contextlib.suppress(OSError):
            lock = os.open(run / "lock", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(run, ignore_errors=True)
            finally:
                os.close(lock)


def _is_loaded(library: Path) -> bool:
    """Return whether this process has loaded a library, which proves that it is complete."""
    try:
        ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD)
    except OSError:
        return False
    return True


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:32]


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it if the file system has no hard links."""
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
