"""The MLX backend: the only package with imports from mlx and mlx_lm.

Within it, only ``upstream.names`` takes names from mlx_lm, because they move between releases.
Importing this package imports neither library: the engine's thread does that in
:meth:`MlxBackend.open`, while the server already answers.
"""

from runner_server.mlx_backend.backend import MlxBackend

__all__ = ["MlxBackend"]
