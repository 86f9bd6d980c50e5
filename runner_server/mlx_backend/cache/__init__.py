"""KV caches and recurrent states of single rows and of a batch."""
