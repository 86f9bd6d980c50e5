"""Listening, TLS, authentication, and the interceptors around each RPC."""
