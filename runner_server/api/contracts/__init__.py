"""Protocols of gateways, served by the same engine."""
