"""The memory plan of a load, made before weights are read."""
