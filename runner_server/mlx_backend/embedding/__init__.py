"""Vectors of texts from the hidden states of mlx_lm's models."""
