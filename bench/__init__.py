"""Benchmark of this runner against its peers, on one machine, in one run.

Run ``make bench``; ``docs/benchmarks.md`` shows the last full run.
"""
