"""The service: requests parsed and checked once, results as messages."""
