"""Stand-in of the Hugging Face hub on loopback, with faults on request.

It answers what ``mlx-runner pull`` asks: the files of a model at a revision, and their bytes, those
of LFS files from another path after a redirect, with ranges.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")


@dataclass(frozen=True)
class Sent:
    """Bytes of a file that were sent.

    Attributes:
        name: The file.
        start: Position of the first byte.
        count: Number of bytes.
    """

    name: str
    start: int
    count: int


@dataclass
class StandInHub:
    """A hub with one model, ``org/demo``.

    Attributes:
        url: Address of the server.
        trees: Files by commit.
        revisions: Commits by branch or tag.
        statuses: Status, code and headers of the answer to a path that ends with the key.
        cuts: Number of bytes after which the connection of a file's answer is closed, once.
        stalls: Number of bytes after which a file's answer waits for ``released``, once.
        damaged: Files of which a byte is wrong; each answer removes an entry.
        tokens: Tokens in the requests.
        sent: What was sent of which file.
        ignores_ranges: Whether every answer is the whole file.
        released: Ends the waits of ``stalls``.
    """

    url: str = ""
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    statuses: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    cuts: dict[str, int] = field(default_factory=dict)
    stalls: dict[str, int] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    sent: list[Sent] = field(default_factory=list)
    ignores_ranges: bool = False
    released: threading.Event = field(default_factory=threading.Event)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Make these files the content of a branch; return the commit."""
        commit = git_digest(
            repr(sorted((name, git_digest(files[name])) for name in files)).encode()
        )
        self.trees[commit] = files
        self.revisions[branch] = commit
        return commit

    def sent_bytes(self, name: str) -> int:
        """Return how many bytes of a file were sent."""
        return sum(each.count for each in self.sent if each.name == name)

    def starts(self, name: str) -> list[int]:
        """Return the positions at which the answers for a file began."""
        return [each.start for each in self.sent if each.name == name]


def git_digest(data: bytes) -> str:
    """Return git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def digest(name: str, data: bytes) -> str:
    """Return a file's digest, which is its name in the cache."""
    return hashlib.sha256(data).hexdigest() if name.endswith(LFS_SUFFIXES) else git_digest(data)


def sibling(name: str, data: bytes) -> dict[str, object]:
    """Return a file's entry in the description of a model."""
    entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git_digest(data)}
    if name.endswith(LFS_SUFFIXES):
        sha = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"sha256": sha, "size": len(data), "pointerSize": 130}
    return entry


@contextmanager
def stand_in_hub() -> Iterator[StandInHub]:
    """Run a hub for the duration of a block."""
    hub = StandInHub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _answer(hub, self)

        def log_message(self, *_arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(hub: StandInHub, call: BaseHTTPRequestHandler) -> None:
    path = unquote(urlsplit(call.path).path)
    hub.tokens.add(call.headers.get("Authorization", ""))
    for end, (status, headers) in hub.statuses.items():
        if path.endswith(end):
            return _send(call, status, headers)
    match path.strip("/").split("/"):
        case ["api", "models", "org", "demo"]:
            return _describe(hub, call, "main")
        case ["api", "models", "org", "demo", "revision", *revision]:
            return _describe(hub, call, "/".join(revision))
        case ["org", "demo", "resolve", commit, *name]:
            return _resolve(hub, call, commit, "/".join(name))
        case ["cdn", commit, *name]:
            return _serve(hub, call, "/".join(name), hub.trees[commit]["/".join(name)])
    return _send(call, 404, {"X-Error-Code": "RepoNotFound"})


def _send(
    call: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes = b""
) -> None:
    call.send_response(status)
    for name, value in headers.items():
        call.send_header(name, value)
    call.send_header("Content-Length", str(len(body)))
    call.end_headers()
    call.wfile.write(body)


def _describe(hub: StandInHub, call: BaseHTTPRequestHandler, revision: str) -> None:
    commit = hub.revisions.get(revision, revision)
    if commit not in hub.trees:
        return _send(call, 404, {"X-Error-Code": "RevisionNotFound"})
    files = [sibling(name, data) for name, data in hub.trees[commit].items()]
    body = {"_id": "1", "id": "org/demo", "modelId": "org/demo", "sha": commit, "siblings": files}
    return _send(call, 200, {"Content-Type": "application/json"}, json.dumps(body).encode())


def _resolve(hub: StandInHub, call: BaseHTTPRequestHandler, commit: str, name: str) -> None:
    data = hub.trees.get(commit, {}).get(name)
    if data is None:
        return _send(call, 404, {"X-Error-Code": "EntryNotFound"})
    if name.endswith(LFS_SUFFIXES):
        return _send(call, 302, {"Location": f"{hub.url}/cdn/{commit}/{name}"})
    return _serve(hub, call, name, data)


def _serve(hub: StandInHub, call: BaseHTTPRequestHandler, name: str, data: bytes) -> None:
    start, stop = 0, len(data)
    wanted = call.headers.get("Range", "")
    is_part = bool(wanted) and not hub.ignores_ranges
    if is_part:
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(stop, int(last) + 1) if last else stop
    body = bytearray(data[start:stop])
    is_weights_body = not (is_part and wanted.partition("-")[2])
    if is_weights_body and name in hub.damaged:
        hub.damaged.remove(name)
        body[-1] ^= 1
    call.send_response(206 if is_part else 200)
    call.send_header("Content-Length", str(len(body)))
    if is_part:
        call.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
    call.end_headers()
    stall = hub.stalls.pop(name, None) if is_weights_body else None
    cut = hub.cuts.pop(name, None) if is_weights_body else None
    count = min(len(body), *(each for each in (stall, cut) if each is not None), len(body))
    # Before the client can act on the answer.
    hub.sent.append(Sent(name, start, count))
    call.wfile.write(body[:count])
    if stall is not None:
        hub.released.wait()
    call.close_connection = True
