"""Configuration of a pool's server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runner_client.pool.scheduling.settings import PoolSettings

if TYPE_CHECKING:
    from runner_common.serving.tls import TlsFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolServerConfig:
    """Configuration of a pool's server.

    Attributes:
        listen: ``HOST:PORT`` (port 0 = any free one) or ``unix:/path``.
        settings: The settings of the pool.
        tls: Certificate and key; None does not encrypt.
        token: Token required of callers; None requires none.
        use_token: Second token, whose holders may only use models; None if there is none.
        exit_with_parent: Whether to exit when the parent process does.
        http: Host and port of the HTTP interfaces; None serves none.
        metrics_listen: Host and port for Prometheus scrapes; None serves no metrics.
        blas: BLAS library of the runners, as for ``RunnerProcess``.
    """

    listen: str = "127.0.0.1:0"
    settings: PoolSettings = field(default_factory=PoolSettings)
    tls: TlsFiles | None = None
    token: str | None = field(default=None, repr=False)
    use_token: str | None = field(default=None, repr=False)
    exit_with_parent: bool = False
    http: tuple[str, int] | None = None
    metrics_listen: tuple[str, int] | None = None
    blas: str = "auto"
