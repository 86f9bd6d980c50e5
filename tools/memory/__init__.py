"""Memory measurements on small models of every type that mlx_lm loads."""
