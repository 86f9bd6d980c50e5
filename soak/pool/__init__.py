"""Soak test of pools: five models within the memory of two.

``python -m soak pool`` runs it; docs/pool.md has the checks and results.
"""
