"""The parts of mlx_lm that this project uses, and how they are imported."""
