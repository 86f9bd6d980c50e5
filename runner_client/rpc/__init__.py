"""Clients for a runner that is running: calls, streams and channels."""
