"""Reading of JSON bodies, which may be hostile."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NoReturn

from runner_common.contract import MAX_REQUEST_BYTES
from runner_common.serving.interceptor import UnreadableRequestError
from runner_common.serving.unknown_fields import WHOLE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import Receive

JsonObject = dict[str, Any]

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""Escape of half a character, which JSON may have and UTF-8 may not."""


class TooLargeError(UnreadableRequestError):
    """The body is larger than ``MAX_REQUEST_BYTES``."""

    def __init__(self) -> None:
        super().__init__([(WHOLE, f"the body has more than {MAX_REQUEST_BYTES} bytes")])


class DisconnectedError(Exception):
    """The client disconnected before the end of the body."""


_BROWSER_HEADERS = frozenset({"origin", "sec-fetch-site"})
"""Headers of requests that pages of web sites make, of which browsers send at least one."""


async def read_json(
    headers: Mapping[str, str], receive: Receive, *, takes_any_type: bool = False
) -> JsonObject:
    """Return the JSON object in the body of a request.

    Args:
        headers: Headers of the request, in lower case.
        receive: Receives the body.
        takes_any_type: Whether programs other than browsers may send another content type.

    Raises:
        UnreadableRequestError: The body is not a JSON object, or its type is another.
        DisconnectedError: The client is gone.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    # Other sites can make a browser send some types without asking first, but not this one.
    is_program = takes_any_type and _BROWSER_HEADERS.isdisjoint(headers)
    if kind != "application/json" and not is_program:
        _refuse(f"the content type is {kind[:40]!r}; it must be application/json")
    if headers.get("content-encoding", "identity").lower() != "identity":
        _refuse("the body is compressed; send it as it is")
    size = headers.get("content-length", "")
    if size.isdecimal() and int(size[:20]) > MAX_REQUEST_BYTES:
        raise TooLargeError
    return _parse(await _read(receive))


async def _read(receive: Receive) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise DisconnectedError
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > MAX_REQUEST_BYTES:
            raise TooLargeError
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _parse(body: bytes) -> JsonObject:
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant)
        if _SURROGATE.search(body):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        _refuse(r"a text has half a character (an unpaired \ud800 to \udfff)")
    except UnicodeDecodeError:
        _refuse("the body is not UTF-8")
    except RecursionError:
        _refuse("the body is nested too deeply")
    except ValueError as error:
        _refuse(f"the body is not JSON: {str(error)[:120]}")
    if not isinstance(value, dict):
        _refuse("the body is not a JSON object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _refuse(text: str) -> NoReturn:
    raise UnreadableRequestError([(WHOLE, text)])
