"""Small models of every type that mlx_lm loads, and measurements of what they allocate."""
