"""Protocols of gateways, served on the same engine as ``RunnerService``."""
