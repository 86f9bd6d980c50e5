"""One model in several processes: rank 0 serves, and the other ranks repeat each call.

Rank 0 sends the followers each call of the engine to the model library before making it, and each
reading of its clock, so that all ranks make the same MLX calls in the same order. This package is
independent of MLX; ``runner_server.mlx_backend.sharding`` is not.
"""
