"""Query of a model's memory need, which a short-lived process answers.

The process builds the model with lazy weights, as a server does before it reads them, and prints
the need according to the server's own plan. Answers are cached by the identity of the model's
files, so that each model is built once. Only one such process runs at a time, so that many programs
that start together do not fill the memory they ask about.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner_common.contract import DEFAULT_PARALLEL
from runner_common.interpreter import NoInterpreterError, interpreter
from runner_common.memory.need import MemoryNeed
from runner_common.user_folders import cache_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_TIMEOUT_SECONDS = 120.0
_LOCK_SECONDS = 60.0
_LOCK_POLL_SECONDS = 0.02
_MAX_CACHED = 512
_MAX_FILES = 4096
_VERSIONS = ("mlx", "mlx-lm", "mlx-cuda-12", "mlx-cuda-13", "tokenizers", "transformers")
_PACKAGE = "runner_server"
_PRELOAD = "LD_PRELOAD"
"""Variable with the BLAS library, whose memory is part of the need."""


@dataclass(frozen=True, slots=True)
class NeedRequest:
    """Options of a load; see ``LoadRequest`` in the protocol.

    Attributes:
        path: The model's directory.
        context_length: Longest sequence in tokens; None for the default.
        parallel: Most requests decoded together.
        dtype: ``"auto"``, ``"as_stored"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        memory_limit_bytes: Most memory that MLX may hold; None for no limit.
        prefix_cache_bytes: Byte budget of the prefix cache; None for the default.
        allow_inexact: Whether to plan a model that cannot be computed exactly as its files say.
        kv_bits: Bits of a number in the KV caches; 0 for the format of the weights.
        adapters: Names and directories of the adapters to load with it.
        draft_path: The directory of the draft model; empty for none.
    """

    path: str
    context_length: int | None = None
    parallel: int = DEFAULT_PARALLEL
    dtype: str = "auto"
    memory_limit_bytes: int | None = None
    prefix_cache_bytes: int | None = None
    allow_inexact: bool = False
    kv_bits: int = 0
    adapters: tuple[tuple[str, str], ...] = ()
    draft_path: str = ""


@dataclass(frozen=True, slots=True)
class NeedAnswer:
    """Memory need computed by the server's plan.

    Attributes:
        need: The memory, part by part.
        dtype: The format of the weights counted; never ``"auto"``.
        context_length: The longest sequence counted, in tokens.
        model_context_length: The model's own limit, in tokens.
        parallel: Number of sequences counted; 1 if the model does not support more.
        notes: Differences between the model's answers and the specification in its files.
    """

    need: MemoryNeed
    dtype: str
    context_length: int
    model_context_length: int
    parallel: int
    notes: tuple[str, ...] = ()


class NeedRefusedError(Exception):
    """A load of the model would be refused, however much memory the machine has.

    Attributes:
        reason: The protocol's reason, for instance ``"MODEL_UNSUPPORTED"``.
        metadata: The ``ErrorInfo.metadata`` of the refusal.
        violations: Pairs of a field and a description of the problem, for
            ``"INVALID_FIELD"``.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        metadata: Mapping[str, str],
        violations: list[tuple[str, str]],
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.metadata = dict(metadata)
        self.violations = violations


class NeedUnknownError(Exception):
    """The answering process crashed or took too long."""


def can_ask() -> bool:
    """Return whether there is a Python interpreter with the packages a query needs."""
    try:
        interpreter()
    except NoInterpreterError:
        return False
    return all(util.find_spec(name) for name in (_PACKAGE, "mlx", "mlx_lm"))


def ask_need(request: NeedRequest, environ: Mapping[str, str] = os.environ) -> NeedAnswer:
    """Return the memory a server would plan for a load.

    Args:
        request: The load.
        environ: Environment of the process. It also sets the cache folder
            (``XDG_CACHE_HOME``).

    Raises:
        NeedRefusedError: The model cannot be loaded, or a field is out of range.
        NeedUnknownError: The process crashed or took more than two minutes.
    """
    cache = _Cache(request, environ)
    if answer := cache.read():
        return answer
    with cache.locked():
        # Another process may have asked while this one waited for the lock.
        if answer := cache.read():
            return answer
        answer = _answer(_run(request, environ))
        cache.write(answer)
    return answer


def _run(request: NeedRequest, environ: Mapping[str, str]) -> dict[str, Any]:
    try:
        command = [
            interpreter(),
            "-P",
            "-m",
            f"{_PACKAGE}.mlx_backend.estimating",
            json.dumps(asdict(request)),
        ]
        done = subprocess.run(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
        last = done.stdout.decode(errors="replace").strip().rpartition("\n")[2]
        answer = json.loads(last)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NeedUnknownError(f"the process that plans a load gave no answer: {error}") from error
    except ValueError as error:
        tail = done.stderr.decode(errors="replace").strip()[-500:]
        raise NeedUnknownError(
            f"the process that plans a load ended with exit code {done.returncode}: {tail}"
        ) from error
    return dict(answer)


def _answer(values: dict[str, Any]) -> NeedAnswer:
    if "reason" in values:
        violations = [(str(field), str(text)) for field, text in values["violations"]]
        raise NeedRefusedError(values["reason"], values["message"], values["metadata"], violations)
    need, notes = MemoryNeed(**values["need"]), tuple(values["notes"])
    return NeedAnswer(**{**values, "need": need, "notes": notes})


class _Cache:
    """Cache file of one request's answer."""

    def __init__(self, request: NeedRequest, environ: Mapping[str, str]) -> None:
        cache = cache_folder(environ)
        self._folder = cache / "mlx-runner" / "estimates" if cache else None
        self._name = f"{_identity(request, environ.get(_PRELOAD, ''))}.json"

    def read(self) -> NeedAnswer | None:
        """Return the cached answer; None if missing or unreadable."""
        if not self._folder:
            return None
        try:
            return _answer(json.loads((self._folder / self._name).read_bytes()))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, answer: NeedAnswer) -> None:
        """Store the answer and delete the oldest entries beyond the limit; ignore failures."""
        if not self._folder:
            return
        with contextlib.suppress(OSError):
            with tempfile.NamedTemporaryFile("w", dir=self._folder, delete=False) as file:
                json.dump(asdict(answer), file)
            Path(file.name).replace(self._folder / self._name)
            kept = sorted(self._folder.glob("*.json"), key=_age)
            for old in kept[_MAX_CACHED:]:
                old.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes of this user from asking, at most for a minute."""
        if not self._folder:
            yield
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(
                self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError:  # no place for the cache; asking still works
            yield
            return
        try:
            _wait_for_lock(descriptor)
            yield
        finally:
            os.close(descriptor)


def _wait_for_lock(descriptor: int) -> None:
    """Lock a file; after a minute go on without the lock, which a stopped process may hold."""
    # Missing on Windows, which has clients but no runners.
    import fcntl  # noqa: PLC0415 - see above

    deadline = time.monotonic() + _LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(_LOCK_POLL_SECONDS)
        else:
            return


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:
        return 0.0


def _identity(request: NeedRequest, preloaded: str) -> str:
    """Return a hash of a request, the model's files, preloaded libraries and the answering code."""
    parts = [
        json.dumps(asdict(request), sort_keys=True),
        preloaded,
        sys.version,
        *_stamps(Path(request.path)),
        *(stamp for _, path in request.adapters for stamp in _stamps(Path(path))),
        *(_stamps(Path(request.draft_path)) if request.draft_path else ()),
        *(f"{name} {_version(name)}" for name in _VERSIONS),
        *_code_stamps(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]


def _stamps(folder: Path) -> list[str]:
    """Return stamps of the files in a directory."""
    with contextlib.suppress(OSError):
        files = sorted(folder.iterdir())[:_MAX_FILES]
        return [stamp for file in files for stamp in _stamp(file)]
    return []


def _code_stamps() -> list[str]:
    """Return stamps of every module that may affect the answer."""
    specs = [util.find_spec(name) for name in (_PACKAGE, __package__.partition(".")[0])]
    folders = [
        Path(folder) for spec in specs if spec for folder in spec.submodule_search_locations or ()
    ]
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    return [stamp for file in files for stamp in _stamp(file)]


def _stamp(file: Path) -> list[str]:
    with contextlib.suppress(OSError):
        stat = file.stat()
        return [f"{file.name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"]
    return []


def _version(name: str) -> str:
    from importlib import metadata  # noqa: PLC0415 - slow, and servers rarely need it

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
