"""The log of a server on stderr, as text or JSON."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping

_TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@runtime_checkable
class LogLine(Protocol):
    """Message of a log record with fields for programs.

    Attributes:
        summary: The message without the fields.
        fields: The fields by name.
    """

    summary: str
    fields: Mapping[str, str | int | float]


class JsonFormatter(logging.Formatter):
    """Formats each log record as a JSON object, which includes the fields of a ``LogLine``."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; see ``logging.Formatter``."""
        # Typed as text by the library, although any object may be logged.
        message: Any = record.msg
        line = message if isinstance(message, LogLine) else None
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": line.summary if line else record.getMessage(),
        }
        if line:
            entry |= line.fields
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def set_up_logging(level: str, style: str) -> None:
    """Send the log of this process to stderr.

    Args:
        level: Level of Python's logging.
        style: ``text`` or ``json``.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else logging.Formatter(_TEXT_FORMAT))
    logging.basicConfig(level=level, handlers=[handler])
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_not_redundant)


def _is_not_redundant(record: logging.LogRecord) -> bool:
    """Drop gRPC's traceback of an unsent message: the log line of the call reports the cause."""
    return not str(record.msg).startswith("ExecuteBatchError")
