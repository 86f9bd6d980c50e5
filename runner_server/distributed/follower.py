"""Follower ranks: the same model library, driven by rank 0's messages."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from runner_server.distributed import messages as msg
from runner_server.distributed.faults import failure_of
from runner_server.distributed.follower_state import FollowerState, next_state
from runner_server.distributed.link import BEAT_SECONDS, Link
from runner_server.engine.backend import Backend, Executor, LoadedModel
from runner_server.engine.types import LoadSpec
from runner_server.engine.work import DecodeItem, EmbedItem, PrefillItem
from runner_server.host.resident_memory import resident_bytes

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 5.0
"""Longest wait for this rank's own end after rank 0 has sent ``Close`` and disconnected."""


class _AbortedError(Exception):
    """Rank 0 has cancelled a load."""


class LeaderChannel:
    """A follower's end of the protocol: messages from rank 0, answers, and the state of this rank.

    A dedicated thread reads the connection. Call everything except :meth:`send_memory` on the
    thread that opened the library.

    Args:
        link: The connection to rank 0.
        on_lost: Called once, on the reading thread, when rank 0 is lost. Should end the process,
            because another thread may be blocked inside MLX indefinitely.

    Attributes:
        state: The state of this rank.
    """

    def __init__(self, link: Link, on_lost: Callable[[], object]) -> None:
        self._link = link
        self._on_lost = on_lost
        self._messages: queue.SimpleQueue[msg.Message] = queue.SimpleQueue()
        self._is_closing = False
        self.state = FollowerState.IDLE

    def start(self) -> None:
        """Start the reading thread."""
        threading.Thread(target=self._read, name="rank 0", daemon=True).start()

    def get(self) -> msg.Message:
        """Wait for the next message, and enter the next state.

        Raises:
            RuntimeError: The state does not allow the message, so the ranks are out of step.
        """
        message = self._messages.get()
        self.state = next_state(self.state, message)
        return message

    def answer(self, message: msg.LoadRead | msg.LoadFailed) -> None:
        """Send the answer to a load; raise like :meth:`get` if the state does not allow it."""
        self.state = next_state(self.state, message)
        self._link.send(message)

    def send_memory(self, memory: msg.Memory) -> None:
        """Send this rank's memory, as a heartbeat. Thread-safe.

        Raises:
            OSError: Rank 0 is lost.
        """
        self._link.send(memory)

    @property
    def has_message(self) -> bool:
        """True if a message is waiting."""
        return not self._messages.empty()

    def _read(self) -> None:
        try:
            for message in self._link.messages():
                if isinstance(message, msg.Beat):
                    continue
                self._is_closing = isinstance(message, msg.Close)
                self._messages.put(message)
        except (OSError, ValueError) as error:
            if self._is_closing:
                time.sleep(_CLOSE_SECONDS)
            logger.critical("rank 0 is lost (%s); this rank exits", error)
            self._on_lost()


class FollowerPartners:
    """Coordinates a load on a follower with rank 0; see ``Partners``.

    Args:
        channel: This rank's end of the protocol.
    """

    def __init__(self, channel: LeaderChannel) -> None:
        self._channel = channel

    def begin_load(self, _spec: LoadSpec) -> None:
        """Do nothing, because rank 0 has already begun the load."""

    def finish_load(self, _report: Callable[[int], None], kv_share: float) -> float:
        """Report this rank's part as read, and wait for rank 0 to continue or cancel."""
        self._channel.answer(msg.LoadRead(kv_share))
        if isinstance(self._channel.get(), msg.AbortLoad):
            raise _AbortedError
        return kv_share

    def check_aborted(self, _progress: int) -> None:
        """Stop the load if rank 0 has cancelled it; called with the progress of the load."""
        if self._channel.state is FollowerState.READING and self._channel.has_message:
            self._channel.get()
            raise _AbortedError


class Follower:
    """Executes the messages of rank 0 until ``Close``.

    Args:
        backend: The model library, created with :class:`FollowerPartners` on the same channel.
        channel: This rank's end of the protocol.
    """

    def __init__(self, backend: Backend, channel: LeaderChannel) -> None:
        self._backend = backend
        self._channel = channel
        self._model: LoadedModel | None = None
        self._executor: Executor | None = None

    def run(self) -> None:
        """Follow rank 0 until ``Close``. Call on the thread which opened the library.

        Raises:
            Exception: Any error, after which this rank cannot continue.
        """
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        while not isinstance(message := self._channel.get(), msg.Close):
            self._handle(message)
        self._model = self._executor = None
        self._backend.release()
        self._backend.close()

    def _handle(self, message: msg.Message) -> None:
        match message:
            case msg.StartLoad(spec):
                self._load(spec)
            case msg.AbortLoad():
                # The load has already ended on this rank.
                pass
            case msg.NewExecutor():
                self._executor = self._require_model().new_executor()
            case msg.LimitPrefixCache(limit_bytes):
                self._require_model().limit_prefix_cache(limit_bytes)
            case msg.Release(for_next):
                self._model = None
                self._backend.release(for_next=for_next)
            case msg.Trim():
                self._backend.trim()
            case _:
                self._handle_rows(message)

    def _handle_rows(self, message: msg.Message) -> None:
        executor = self._require_executor()
        match message:
            case msg.AddRow(row, prompt_ids, sampling, cache_policy):
                executor.add(row, prompt_ids, sampling, cache_policy)
            case msg.RunPrefill(chunks):
                executor.run(PrefillItem(chunks))
            case msg.RunDecode(joining, expected):
                executor.run(DecodeItem(joining, expected))
            case msg.AddTexts(row, texts):
                executor.add_texts(row, texts)
            case msg.RunEmbed(texts_chunks):
                executor.run(EmbedItem(texts_chunks))
            case msg.PreemptRow(row):
                executor.preempt(row)
            case msg.RemoveRows(rows):
                executor.remove(rows)
            case msg.CloseExecutor():
                executor.close()
                self._executor = None
            case _:
                raise RuntimeError(f"rank 0 sent an unexpected message: {message}")

    def _load(self, spec: LoadSpec) -> None:
        try:
            self._model = self._backend.load(spec, FollowerPartners(self._channel).check_aborted)
        except Exception as error:
            if self._channel.state is FollowerState.LOADED:
                raise
            if isinstance(error, _AbortedError):
                logger.info("rank 0 has cancelled the load of %r", spec.model)
            else:
                logger.exception("this rank cannot load %r", spec.model)
            # If rank 0 cancelled after this rank's answer, it does not wait for another one.
            if self._channel.state in (FollowerState.READING, FollowerState.ABORTED):
                self._channel.answer(failure_of(error))

    def _require_model(self) -> LoadedModel:
        if self._model is None:
            raise RuntimeError("rank 0 uses a model, but this rank has none")
        return self._model

    def _require_executor(self) -> Executor:
        if self._executor is None:
            raise RuntimeError("rank 0 uses an executor, but this rank has none")
        return self._executor

    def _beat(self) -> None:
        while True:
            counters, model = self._backend.memory(), self._model
            limit_bytes = model.info.limit_bytes if model else 0
            try:
                self._channel.send_memory(msg.Memory(counters, resident_bytes(), limit_bytes))
            except OSError:
                # Rank 0 is lost, and the reading thread ends the process.
                return
            time.sleep(BEAT_SECONDS)
