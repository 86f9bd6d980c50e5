"""The names used from mlx_lm, and how mlx_lm is imported."""
