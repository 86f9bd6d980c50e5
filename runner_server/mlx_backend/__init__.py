"""The MLX backend, the only package that imports mlx and mlx_lm.

Within it, only ``upstream.names`` imports from mlx_lm, because names there move between releases.
Importing this package imports neither library. The engine's thread does that in
:meth:`MlxBackend.open`, while the server already answers calls.
"""

from runner_server.mlx_backend.backend import MlxBackend

__all__ = ["MlxBackend"]
