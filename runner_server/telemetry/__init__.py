"""Telemetry of calls: records, the request log, metrics and traces."""
