"""The engine: one thread, a scheduler and running requests, without MLX."""
