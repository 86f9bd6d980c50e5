"""Sampling of the next token for each row of a batch."""
