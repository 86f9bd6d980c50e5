"""The process that hosts one MLX language model and serves it over gRPC."""

__version__ = "0.2.0"
"""As in pyproject.toml. To ask importlib.metadata for it takes a sixth of the time in
which a server is ready."""
