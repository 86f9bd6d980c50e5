"""The process that hosts one MLX language model and serves it over gRPC."""
