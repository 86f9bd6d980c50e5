"""Comparison of this runner with mlx_lm on tiny models of every type mlx_lm has."""
