"""Follower ranks: the same model library, driven by rank 0's messages."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from runner_server.distributed.faults import fault_values
from runner_server.distributed.link import BEAT_SECONDS, Link
from runner_server.distributed.work_values import item_of
from runner_server.engine.backend import Backend, Executor, LoadedModel
from runner_server.engine.types import Dtype, LoadSpec, Sampling
from runner_server.host.resident_memory import resident_bytes

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 5.0
"""Longest wait for this rank's own end after rank 0 has sent ``close`` and disconnected."""


class _AbortedError(Exception):
    """Rank 0 has cancelled a load."""


class Inbox:
    """Messages of rank 0, read on a separate thread.

    Args:
        link: The connection to rank 0.
        on_lost: Called once, on that thread, when rank 0 is lost; should end the process,
            because another thread may be blocked inside MLX indefinitely.
    """

    def __init__(self, link: Link, on_lost: Callable[[], object]) -> None:
        self._link = link
        self._on_lost = on_lost
        self._messages: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._is_closing = False

    def start(self) -> None:
        """Start reading."""
        threading.Thread(target=self._read, name="rank 0", daemon=True).start()

    def get(self) -> list[Any]:
        """Block until the next message, without polling."""
        return self._messages.get()

    def expect(self, kind: str) -> list[Any]:
        """Return the values of the next message, which must be of the given kind.

        Raises:
            RuntimeError: The message is of another kind: the ranks are out of step.
        """
        found, *values = self.get()
        if found != kind:
            raise RuntimeError(f"rank 0 sent {found!r} where this rank expected {kind!r}")
        return values

    @property
    def has_news(self) -> bool:
        """True if a message is waiting."""
        return not self._messages.empty()

    def _read(self) -> None:
        try:
            for message in self._link.messages():
                if message[0] == "beat":
                    continue
                self._is_closing = message[0] == "close"
                self._messages.put(message)
        except (OSError, ValueError) as error:
            if self._is_closing:
                time.sleep(_CLOSE_SECONDS)
            logger.critical("rank 0 is lost (%s); this rank exits", error)
            self._on_lost()


class FollowerPartners:
    """Coordination of a load on this rank with rank 0; see ``Partners``.

    Args:
        link: The connection to rank 0.
        inbox: Messages of rank 0.

    Attributes:
        is_in_step: Whether all ranks work together, so that a failure here ends all of them.
    """

    def __init__(self, link: Link, inbox: Inbox) -> None:
        self._link = link
        self._inbox = inbox
        self.is_in_step = False
        self._has_answered = False

    def start_load(self) -> None:
        """Start a load, which rank 0 may cancel until ``go`` and expects one answer to."""
        self.is_in_step = self._has_answered = False

    def begin_load(self, _spec: LoadSpec) -> None:
        """Do nothing: rank 0 has begun the load."""

    def finish_load(self, _report: Callable[[int], None], kv_share: float) -> float:
        """Report this rank's part as read and wait for rank 0 to go on."""
        self._link.send("loaded", kv_share)
        self._has_answered = True
        (kind, *_) = self._inbox.get()
        if kind != "go":
            raise _AbortedError
        self.is_in_step = True
        return kv_share

    def check_aborted(self, _progress: int) -> None:
        """Stop a load cancelled by rank 0."""
        if not self.is_in_step and self._inbox.has_news:
            self._inbox.expect("abort")
            raise _AbortedError

    def fail_load(self, error: Exception) -> None:
        """Report a failed load to rank 0, unless already answered."""
        if not self._has_answered:
            self._link.send("failed", *fault_values(error))


class Follower:
    """Executes the calls of rank 0 until ``close``.

    Args:
        backend: The model library.
        link: The connection to rank 0.
        inbox: Messages of rank 0.
        partners: The partners that ``backend`` was created with.
    """

    def __init__(
        self, backend: Backend, link: Link, inbox: Inbox, partners: FollowerPartners
    ) -> None:
        self._partners = partners
        self._backend = backend
        self._link = link
        self._inbox = inbox
        self._model: LoadedModel | None = None
        self._executor: Executor | None = None
        self._calls: dict[str, Callable[..., object]] = {
            "load": self._load,
            "new_executor": self._new_executor,
            "add": self._add,
            "run": lambda values: self._require_executor().run(item_of(values)),
            "preempt": lambda row: self._require_executor().preempt(row),
            "remove": lambda rows: self._require_executor().remove(rows),
            "close_executor": self._close_executor,
            "limit_prefix_cache": lambda limit: self._require_model().limit_prefix_cache(limit),
            "release": self._release,
            "trim": self._backend.trim,
            # For a load that has already failed here.
            "abort": lambda: None,
        }

    def run(self) -> None:
        """Follow rank 0. Call on the thread that opened the library.

        Raises:
            Exception: Any MLX error: this rank cannot continue.
        """
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        while True:
            kind, *values = self._inbox.get()
            if kind == "close":
                break
            self._calls[kind](*values)
        self._model = self._executor = None
        self._backend.release()
        self._backend.close()

    def _load(self, fields: dict[str, Any]) -> None:
        spec = LoadSpec(**fields | {"dtype": Dtype(fields["dtype"])})
        self._partners.start_load()
        try:
            self._model = self._backend.load(spec, self._partners.check_aborted)
        except Exception as error:
            if self._partners.is_in_step:
                raise
            if isinstance(error, _AbortedError):
                logger.info("rank 0 has cancelled the load of %r", spec.model)
            else:
                logger.exception("this rank cannot load %r", spec.model)
            self._partners.fail_load(error)

    def _new_executor(self) -> None:
        self._executor = self._require_model().new_executor()

    def _require_model(self) -> LoadedModel:
        if self._model is None:
            raise RuntimeError("rank 0 uses a model, and none is loaded here")
        return self._model

    def _add(self, row: int, prompt_ids: list[int], sampling: dict[str, Any]) -> None:
        bias = tuple((id_, value) for id_, value in sampling.pop("logit_bias"))
        self._require_executor().add(row, prompt_ids, Sampling(**sampling, logit_bias=bias))

    def _require_executor(self) -> Executor:
        if self._executor is None:
            raise RuntimeError("rank 0 uses an executor that this rank does not have")
        return self._executor

    def _close_executor(self) -> None:
        self._require_executor().close()
        self._executor = None

    def _release(self, for_next: bool) -> None:
        self._model = None
        self._backend.release(for_next=for_next)

    def _beat(self) -> None:
        while True:
            memory, model = self._backend.memory(), self._model
            limit = model.info.limit_bytes if model else 0
            try:
                self._link.send("beat", asdict(memory), resident_bytes(), limit)
            except OSError:
                # Rank 0 is lost: the thread that reads ends the process.
                return
            time.sleep(BEAT_SECONDS)
