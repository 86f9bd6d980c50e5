"""Access to one repository on the hub through huggingface_hub and its environment variables.

These are ``HF_ENDPOINT``, ``HF_TOKEN`` (or the token of ``hf auth login``), ``HF_HUB_OFFLINE`` and
``HF_HUB_DOWNLOAD_TIMEOUT``. Files are fetched over HTTP with ranges rather than with
``hf_hub_download``, which since huggingface_hub 2 begins anew after an interruption.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import quote

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from runner_client.errors import ModelNotFoundError, RunnerError
from runner_client.pull.errors import PullError
from runner_client.pull.files import RemoteFile, Repository

if TYPE_CHECKING:
    from collections.abc import Iterator

    from huggingface_hub.hf_api import ModelInfo, RepoSibling

# The base class of all errors of httpx, or of httpx2 from huggingface_hub 2 on.
_HttpError: type[Exception] = HfHubHTTPError.__bases__[0]

_UNAUTHORIZED, _FORBIDDEN, _TOO_MANY_REQUESTS = 401, 403, 429
_PARTIAL_CONTENT = 206
_SERVER_ERRORS = range(500, 600)


class InterruptedTransferError(PullError):
    """The connection was lost, or the hub failed: trying again may help."""


class Hub:
    """Client of the hub for one repository.

    Args:
        name: ``org/name``.
        revision: A branch, a tag or a commit; None for the main branch.
        endpoint: URL of the hub. Default: ``HF_ENDPOINT``, or https://huggingface.co.
    """

    def __init__(self, name: str, revision: str | None = None, endpoint: str | None = None) -> None:
        self._name = name
        self._revision = revision
        self._endpoint = endpoint or constants.ENDPOINT

    def repository(self) -> Repository:
        """Return the files of the revision at the current commit.

        Raises:
            ModelNotFoundError: The repository or the revision does not exist.
            PullError: The hub refused, failed, or cannot be reached.
        """
        with self._translated():
            info = HfApi(endpoint=self._endpoint).model_info(
                self._name,
                revision=self._revision,
                files_metadata=True,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            )
        files = tuple(_file(sibling) for sibling in info.siblings or ())
        return Repository(self._name, _commit(info), files)

    @contextmanager
    def opened(
        self, file: RemoteFile, commit: str, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Request a range of a file's bytes.

        Args:
            file: The file.
            commit: The commit.
            start: Position of the first byte.
            stop: Position after the last byte; None for the end of the file.

        Yields:
            The position at which the answer begins, which is 0 if the server ignores ranges, and
            the bytes.

        Raises:
            InterruptedTransferError: The connection was lost, or the hub failed.
            PullError: The hub refused.
        """
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        url = f"{self._endpoint}/{self._name}/resolve/{commit}/{quote(file.name)}"
        with (
            self._translated(),
            http_stream_backoff(
                "GET",
                url,
                headers=headers,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                retry_on_exceptions=(),
                retry_on_status_codes=(_TOO_MANY_REQUESTS,),
            ) as response,
        ):
            hf_raise_for_status(response)
            begin = start if response.status_code == _PARTIAL_CONTENT else 0
            yield begin, response.iter_bytes()

    def read(self, file: RemoteFile, commit: str, start: int, stop: int) -> bytes:
        """Return a range of a file's bytes; fewer at its end.

        Raises:
            PullError: The hub refused or failed.
        """
        taken = bytearray()
        with self.opened(file, commit, start, stop) as (begin, chunks):
            wanted = stop - begin
            for chunk in chunks:
                taken += chunk
                # A server that ignores ranges sends the whole file.
                if len(taken) >= wanted:
                    break
        return bytes(taken[start - begin : wanted])

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OfflineModeIsEnabled as error:
            text = "HF_HUB_OFFLINE is set, so nothing is downloaded: unset it, and pull again"
            raise PullError(text) from error
        except HfHubHTTPError as error:
            raise self._refused(error) from error
        except _HttpError as error:
            raise InterruptedTransferError(
                f"{self._endpoint} cannot be reached, or the connection was lost "
                f"({type(error).__name__}: {error}): check the network and HF_ENDPOINT, and pull "
                "again, which continues where this ended"
            ) from error

    def _refused(self, error: HfHubHTTPError) -> RunnerError:
        """Return the error for a failed answer of the hub."""
        name, status = self._name, error.response.status_code
        if isinstance(error, GatedRepoError):
            return PullError(
                f"{name} is gated: accept its terms at {self._endpoint}/{name}, and set HF_TOKEN "
                "to a token of that account"
            )
        if isinstance(error, RevisionNotFoundError):
            text = f"{name} has no revision {self._revision!r} at {self._endpoint}"
            return ModelNotFoundError(text, model=name)
        if isinstance(error, RepositoryNotFoundError):
            return ModelNotFoundError(
                f"there is no model {name} at {self._endpoint}, or it is private: check the name, "
                "and for a private model set HF_TOKEN",
                model=name,
            )
        if status in (_UNAUTHORIZED, _FORBIDDEN):
            return PullError(
                f"{self._endpoint} refused access to {name} (status {status}): set HF_TOKEN to a "
                "valid token that may read it"
            )
        if status == _TOO_MANY_REQUESTS:
            after = error.response.headers.get("Retry-After", "")
            when = f"in {after} seconds" if after.isdecimal() else "later"
            text = f"{self._endpoint} takes no more requests for now: pull again {when}"
            return PullError(text)
        if status in _SERVER_ERRORS:
            return InterruptedTransferError(
                f"{self._endpoint} failed with status {status}: pull again later, which continues "
                "where this ended"
            )
        return PullError(f"{self._endpoint} answered with status {status} for {name}")


def _file(sibling: RepoSibling) -> RemoteFile:
    lfs = sibling.lfs
    size = lfs.size if lfs else sibling.size
    return RemoteFile(sibling.rfilename, size or 0, (lfs.sha256 if lfs else sibling.blob_id) or "")


def _commit(info: ModelInfo) -> str:
    commit = info.sha or ""
    # The name of a folder in the cache.
    if not commit.isalnum():
        raise PullError(f"the hub gives no commit of {info.id}: {commit[:80]!r}")
    return commit
