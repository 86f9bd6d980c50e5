"""Server process hosting one MLX language model over gRPC."""

__version__ = "0.2.0"
"""The version in pyproject.toml, repeated because reading it with importlib.metadata would take a
sixth of the time until the server is ready."""
