"""The benchmark: this runner beside its peers, on one machine, in one run.

``make bench`` runs it; ``docs/benchmarks.md`` shows the last full run.
"""
