"""The engine: one thread, its scheduler, and the requests it runs. Imports no MLX."""
