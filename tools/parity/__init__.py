"""Comparison of this runner with transformers on models that transformers saved."""
