"""Sampling of the next token for all rows of a batch."""
