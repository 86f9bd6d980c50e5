"""States of a follower, and the messages each state allows."""

from __future__ import annotations

import enum

from runner_server.distributed import messages as msg

_ROWS: set[type[msg.Message]] = {
    msg.AddRow,
    msg.RunPrefill,
    msg.RunDecode,
    msg.AddTexts,
    msg.RunEmbed,
    msg.PreemptRow,
    msg.RemoveRows,
    msg.CloseExecutor,
}
_ALWAYS: set[type[msg.Message]] = {msg.Trim, msg.Close}


class FollowerState(enum.Enum):
    """Stage of a follower.

    Attributes:
        IDLE: Has no model.
        READING: Reads its part of a model. Rank 0 waits for the answer, and may cancel.
        READ: Has answered that its part is read. Waits for the other ranks.
        FAILED: Has answered that it cannot load. Rank 0 will cancel the load on all ranks.
        ABORTED: Rank 0 has cancelled the load, and still waits for the answer.
        LOADED: Runs in step with the other ranks, so a failure ends all of them.
    """

    IDLE = enum.auto()
    READING = enum.auto()
    READ = enum.auto()
    FAILED = enum.auto()
    ABORTED = enum.auto()
    LOADED = enum.auto()


_S = FollowerState

TRANSITIONS: dict[tuple[FollowerState, type[msg.Message]], FollowerState] = {
    (_S.IDLE, msg.StartLoad): _S.READING,
    (_S.READING, msg.AbortLoad): _S.ABORTED,
    (_S.ABORTED, msg.LoadFailed): _S.IDLE,
    (_S.READING, msg.LoadRead): _S.READ,
    (_S.READING, msg.LoadFailed): _S.FAILED,
    (_S.READ, msg.AbortLoad): _S.IDLE,
    (_S.READ, msg.FinishLoad): _S.LOADED,
    (_S.FAILED, msg.AbortLoad): _S.IDLE,
    (_S.LOADED, msg.NewExecutor): _S.LOADED,
    (_S.LOADED, msg.LimitPrefixCache): _S.LOADED,
    **{(_S.LOADED, kind): _S.LOADED for kind in _ROWS},
    **{(_S.LOADED, kind): _S.LOADED for kind in _ALWAYS},
    (_S.LOADED, msg.Release): _S.IDLE,
    # Rank 0 releases before every load and after a failed one.
    (_S.IDLE, msg.Release): _S.IDLE,
    **{(_S.IDLE, kind): _S.IDLE for kind in _ALWAYS},
}
"""The state after each message; ``LoadRead`` and ``LoadFailed`` are sent, the others received."""


def next_state(state: FollowerState, message: msg.Message) -> FollowerState:
    """Return the state after a message.

    Raises:
        RuntimeError: The state does not allow the message, so the ranks are out of step.
    """
    try:
        return TRANSITIONS[state, type(message)]
    except KeyError:
        raise RuntimeError(
            f"the ranks are out of step: {type(message).__name__} is not allowed while this rank "
            f"is {state.name}"
        ) from None
