"""Listening, TLS, authentication, reflection and error translation."""
