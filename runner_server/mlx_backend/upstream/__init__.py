"""The import of mlx_lm, and the names used from it."""
