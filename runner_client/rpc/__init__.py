"""Clients for a running runner: calls, streams and channels."""
