"""Contenders of the benchmark, in the order of the tables."""

from __future__ import annotations

from bench.contenders.base import Contender, Setup
from bench.contenders.direct import Direct
from bench.contenders.mlx_lm_server import MlxLmServer
from bench.contenders.ours import Ours
from bench.contenders.smg import Smg

__all__ = ["CONTENDERS", "OURS", "PEERS", "Contender", "Setup"]

CONTENDERS: dict[str, type[Contender]] = {cls.name: cls for cls in (Direct, Ours, MlxLmServer, Smg)}

OURS = Ours.name
PEERS = (MlxLmServer.name, Smg.name)
