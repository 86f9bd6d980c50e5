"""Commands for pools of models."""
