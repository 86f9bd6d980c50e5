"""Call records, the request log, metrics and traces."""
