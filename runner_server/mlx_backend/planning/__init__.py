"""The memory plan of a load, computed before any weights are read."""
