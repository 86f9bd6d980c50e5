"""Holds the runner's answers against mlx_lm's, for tiny models of every type that mlx_lm has."""
