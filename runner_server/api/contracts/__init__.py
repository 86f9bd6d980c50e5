"""Gateway protocols, served by the same engine."""
