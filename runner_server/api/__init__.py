"""The RPC services: request parsing and validation, results as messages."""
