"""Validation of runner addresses."""

from __future__ import annotations

import ipaddress
import re

from runner_common.contract import MAX_PORT

ADDRESS_FORMS = "HOST:PORT, [IPV6]:PORT or unix:/path"
"""Valid forms of an address, for help and error messages."""

_OTHER_TARGETS = re.compile(r"(?:dns|ipv4|ipv6|unix-abstract|vsock|xds):")
"""Target schemes of gRPC, which resolve to one or several addresses."""

_HOST = re.compile(r"[^\s/:?#@\[\]\x00-\x1f]+")


def parse_address(text: str) -> str:
    """Check the address of a runner, and return it unchanged.

    Args:
        text: ``HOST:PORT``, ``[IPV6]:PORT``, ``unix:/path``, or a target with another scheme of
            gRPC (``dns:///host:port``, ``ipv4:host:port,host:port``).

    Raises:
        ValueError: The text is not an address; the message names the problem and the forms.
    """
    problem = _problem(text)
    if problem:
        given = f"{text!r} is not the address of a runner: " if text else ""
        raise ValueError(f"{given}{problem}; expected {ADDRESS_FORMS}")
    return text


def _problem(text: str) -> str | None:
    """Describe the first problem of an address; None if the address is good."""
    if not text:
        return "the address of the runner is empty"
    if text.startswith("unix:"):
        return _problem_of_path(text.removeprefix("unix:"))
    if text.startswith("/"):
        return "the path of a socket needs unix: before it"
    if _OTHER_TARGETS.match(text):
        port = text.rpartition(":")[2]
        # gRPC would truncate a larger number to 16 bits.
        return _problem_of_port(port) if port.isdecimal() else None
    if "://" in text:
        return _problem_of_url(text)
    if "/" in text:
        bare = text.partition("/")[0]
        if _problem_of_host_and_port(bare) is None:
            return f"nothing may follow the port (give {bare})"
        return "it is a path or a hub id"
    return _problem_of_host_and_port(text)


def _problem_of_path(path: str) -> str | None:
    if not path.strip("/"):
        return "the path of the socket is missing"
    if path.startswith("//") and not path.startswith("///"):
        return f"after unix:, a path begins with one slash (give unix:{path[1:]})"
    return None


def _problem_of_url(text: str) -> str:
    scheme, _, rest = text.partition("://")
    bare = rest.partition("/")[0]
    hint = f" (give {bare})" if bare and _problem_of_host_and_port(bare) is None else ""
    return f"an address is not a URL, so {scheme}:// must go{hint}"


def _problem_of_host_and_port(text: str) -> str | None:
    host, separator, port = text.rpartition(":")
    if text.startswith("["):
        if text.endswith("]"):
            return "the port is missing"
        return _problem_of_ipv6(host) or _problem_of_port(port)
    if text.count(":") > 1:
        return "an IPv6 address needs brackets around it"
    if not separator:
        return "the port is missing"
    if not host:
        return "the host is missing"
    if not _HOST.fullmatch(host):
        return f"{host!r} is not a host"
    return _problem_of_port(port)


def _problem_of_ipv6(host: str) -> str | None:
    inside = host.removeprefix("[").removesuffix("]")
    try:
        ipaddress.IPv6Address(inside)
    except ValueError:
        return f"{inside!r} is not an IPv6 address"
    return None if host.endswith("]") else "the bracket of the IPv6 address does not end"


def _problem_of_port(port: str) -> str | None:
    if not port:
        return "the port is missing"
    if not (port.isascii() and port.isdecimal()):
        return f"the port {port!r} is not a number"
    # The length first: Python refuses to convert thousands of digits.
    if len(port) > len(str(MAX_PORT)) or int(port) > MAX_PORT:
        return f"the port is {port}, but at most {MAX_PORT} is possible"
    return None if int(port) else "port 0 is only for a server that listens on any free port"
