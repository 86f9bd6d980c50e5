"""The way to a server: address, credentials, channel, health, and translation of errors."""
