"""Checks and corrections of a model that mlx_lm has built."""
