"""One model in several processes: rank 0 serves, and the other ranks follow.

Rank 0 schedules. It sends each work item to the followers before it runs its own part, so that all
ranks make the same MLX calls in the same order. Only rank 0 reads a clock. This package does not
use MLX; ``runner_server.mlx_backend.sharding`` does.
"""
