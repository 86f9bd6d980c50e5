"""One model in several processes: rank 0 serves, and the other ranks repeat each call.

Rank 0 schedules. It sends the followers each work item before running its own part, so that all
ranks make the same MLX calls in the same order, and only rank 0 reads a clock. This package is
independent of MLX; ``runner_server.mlx_backend.sharding`` is not.
"""
