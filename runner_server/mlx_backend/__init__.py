"""The model adapter: the only room that knows mlx and mlx_lm.

``names`` is the only module that imports mlx_lm's names, because they move
between releases. Importing this package imports neither library: the engine's
thread does that in :meth:`MlxBackend.open`, while the server already answers.
"""

from runner_server.mlx_backend.backend import MlxBackend

__all__ = ["MlxBackend"]
