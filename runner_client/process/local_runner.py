"""Lookup of the process behind a runner's address on this machine."""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING

import psutil

from runner_client.errors import RunnerUnavailableError

if TYPE_CHECKING:
    from runner_client.types import Status


def local_process(address: str, status: Status) -> psutil.Process:
    """Return the process that serves an address.

    A process id alone is not enough: behind a forwarded port or in a container it may belong to
    another process of this machine. The process must therefore listen on the address's port or
    socket.

    Args:
        address: The address of the runner.
        status: The runner's status, which has the process id.

    Raises:
        RunnerUnavailableError: No such process listens there, or it belongs to another user.
    """
    try:
        process = psutil.Process(status.pid)
        is_found = _listens(process, address)
    except psutil.NoSuchProcess:
        is_found = False
    except psutil.AccessDenied as error:
        raise RunnerUnavailableError(
            f"process {status.pid}, which serves {address}, belongs to another user: stop it as "
            "that user"
        ) from error
    if not is_found:
        raise RunnerUnavailableError(
            f"the runner at {address} is process {status.pid} where it runs, and no such process "
            "of this machine listens there: send it SIGINT on its own machine or in its container"
        )
    return process


def _listens(process: psutil.Process, address: str) -> bool:
    """Return whether a process listens on the socket, or on the port, of an address."""
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        path = path.removeprefix("//") if path.startswith("///") else path
        return any(str(each.laddr) == path for each in process.net_connections(kind="unix"))
    host, _, port = address.rpartition(":")
    if not _is_here(host.strip("[]")):
        return False
    sockets = process.net_connections(kind="tcp")
    listening = (each for each in sockets if each.status == psutil.CONN_LISTEN)
    return any(str(each.laddr.port) == port for each in listening)


def _is_here(host: str) -> bool:
    """Return whether a host name or IP address stands for this machine."""
    own = {each.address for parts in psutil.net_if_addrs().values() for each in parts}
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return any(ipaddress.ip_address(each).is_loopback for each in found) or bool(found & own)
