"""Decisions of a pool, without clock, processes or measurements."""
