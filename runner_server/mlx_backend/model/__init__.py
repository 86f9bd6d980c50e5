"""Checks and corrections of models built by mlx_lm."""
