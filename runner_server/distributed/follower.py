"""A rank that follows rank 0: the same adapter, driven by what rank 0 says."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, cast

from runner_server.distributed.faults import fault_values
from runner_server.distributed.link import BEAT_SECONDS, Link
from runner_server.engine.backend import Backend, Batch, LoadedModel
from runner_server.engine.types import Dtype, LoadSpec, Sampling
from runner_server.host.resident_memory import resident_bytes

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 5.0
"""How long the end may take once rank 0 has asked for it, and is gone."""


class _AbortedError(Exception):
    """Rank 0 has given a load up."""


class Inbox:
    """What rank 0 says, read by a thread of its own.

    Args:
        link: The connection to rank 0.
        on_lost: Called once, on that thread, when rank 0 is gone; should end the process,
            because what another thread waits for inside MLX may never come.
    """

    def __init__(self, link: Link, on_lost: Callable[[], object]) -> None:
        self._link = link
        self._on_lost = on_lost
        self._messages: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._is_closing = False

    def start(self) -> None:
        """Starts to read."""
        threading.Thread(target=self._read, name="rank 0", daemon=True).start()

    def get(self) -> list[Any]:
        """Waits for the next message, without using the processor."""
        return self._messages.get()

    def expect(self, kind: str) -> list[Any]:
        """The values of the next message, which must be of this kind.

        Raises:
            RuntimeError: It is another: the ranks have come apart.
        """
        found, *values = self.get()
        if found != kind:
            raise RuntimeError(f"rank 0 said {found!r} where this rank expects {kind!r}")
        return values

    @property
    def has_news(self) -> bool:
        """Whether a message waits."""
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
            logger.critical("rank 0 is gone (%s); this rank ends", error)
            self._on_lost()


class FollowerPartners:
    """What a load and a batch on this rank share with rank 0; see ``Partners``.

    Args:
        link: The connection to rank 0.
        inbox: What rank 0 says.

    Attributes:
        is_in_step: Whether all ranks work together: what fails here now ends them all.
    """

    def __init__(self, link: Link, inbox: Inbox) -> None:
        self._link = link
        self._inbox = inbox
        self.is_in_step = False
        self._has_answered = False

    def start_load(self) -> None:
        """Notes that rank 0 wants an answer, and may give the load up before it has said go."""
        self.is_in_step = self._has_answered = False

    def clock(self) -> float:
        """What rank 0's clock showed at this place."""
        return cast("float", self._inbox.expect("clock")[0])

    def begin_load(self, _spec: LoadSpec) -> None:
        """Nothing: rank 0 has begun it."""

    def finish_load(self, _report: Callable[[int], None], kv_share: float) -> float:
        """Tells that this rank has read its part, and waits for rank 0 to go on."""
        self._link.send("loaded", kv_share)
        self._has_answered = True
        (kind, *_) = self._inbox.get()
        if kind != "go":
            raise _AbortedError
        self.is_in_step = True
        return kv_share

    def check_aborted(self, _progress: int) -> None:
        """Ends a load that rank 0 has given up."""
        if not self.is_in_step and self._inbox.has_news:
            self._inbox.expect("abort")
            raise _AbortedError

    def fail_load(self, error: Exception) -> None:
        """Tells that this rank has not loaded, unless rank 0 has its answer."""
        if not self._has_answered:
            self._link.send("failed", *fault_values(error))


class Follower:
    """Does what rank 0 says until it says ``close``.

    Args:
        backend: The model library.
        link: The connection to rank 0.
        inbox: What rank 0 says.
        partners: Those that ``backend`` was made with.
    """

    def __init__(
        self, backend: Backend, link: Link, inbox: Inbox, partners: FollowerPartners
    ) -> None:
        self._partners = partners
        self._backend = backend
        self._link = link
        self._inbox = inbox
        self._model: LoadedModel | None = None
        self._batch: Batch | None = None
        self._calls: dict[str, Callable[..., object]] = {
            "load": self._load,
            "new_batch": self._new_batch,
            "add": self._add,
            "remove": lambda rows: self._require_batch().remove(rows),
            "preempt": lambda row: self._require_batch().preempt(row),
            "resume": lambda row: self._require_batch().resume(row),
            "step": lambda: self._require_batch().step(),
            "close_batch": self._close_batch,
            "limit_prefix_cache": lambda limit: self._require_model().limit_prefix_cache(limit),
            "release": self._release,
            "trim": self._backend.trim,
            # Of a load that has failed here already.
            "abort": lambda: None,
        }

    def run(self) -> None:
        """Follows; on the thread that opened the library.

        Raises:
            Exception: Whatever MLX raised: this rank cannot go on.
        """
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        while True:
            kind, *values = self._inbox.get()
            if kind == "close":
                break
            self._calls[kind](*values)
        self._model = self._batch = None
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
                logger.info("rank 0 has given the load of %r up", spec.model)
            else:
                logger.exception("this rank cannot load %r", spec.model)
            self._partners.fail_load(error)

    def _new_batch(self) -> None:
        self._batch = self._require_model().new_batch()

    def _require_model(self) -> LoadedModel:
        if self._model is None:
            raise RuntimeError("rank 0 works on a model, and none is loaded here")
        return self._model

    def _add(self, row: int, prompt_ids: list[int], sampling: dict[str, Any]) -> None:
        bias = tuple((id_, value) for id_, value in sampling.pop("logit_bias"))
        self._require_batch().add(row, prompt_ids, Sampling(**sampling, logit_bias=bias))

    def _require_batch(self) -> Batch:
        if self._batch is None:
            raise RuntimeError("rank 0 works on a batch that this rank does not have")
        return self._batch

    def _close_batch(self) -> None:
        self._require_batch().close()
        self._batch = None

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
                # Rank 0 is gone: the thread that reads ends the process.
                return
            time.sleep(BEAT_SECONDS)
