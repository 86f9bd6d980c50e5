"""The way to a server: address, credentials, channel, health, deadlines, translation of errors."""
