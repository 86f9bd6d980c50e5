"""Many models on one machine within one budget of bytes; see docs/pool.md."""
