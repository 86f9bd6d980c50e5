"""Embedding of texts in the engine: requests, their order, and the data passed on."""
