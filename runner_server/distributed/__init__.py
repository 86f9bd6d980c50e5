"""One model in several processes: rank 0 serves, the others follow it call by call.

Rank 0 tells the followers each call of the engine on the model library before it makes it
itself, and each reading of its clock. So all ranks ask MLX for the same in the same order.
Nothing here knows MLX; ``runner_server.mlx_backend.sharding`` does.
"""
