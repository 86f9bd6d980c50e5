"""Soak test: one real runner under twice its capacity for half an hour.

See ``python -m soak --help`` for usage, and docs/reliability.md for the checks and results.
"""
