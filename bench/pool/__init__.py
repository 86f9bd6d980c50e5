"""Benchmark of schedulers of many models: ``python -m bench.pool``; docs/pool.md has the results.

Two schedulers run the same trace, and the ways to swap a model are compared.
"""
