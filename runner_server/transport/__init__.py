"""Listening, TLS, authentication and error translation."""
