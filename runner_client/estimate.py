"""Estimates of the memory that a runner needs, without loading a model."""

from runner_client.memory.estimation import MemoryEstimate, estimate

__all__ = ["MemoryEstimate", "estimate"]
