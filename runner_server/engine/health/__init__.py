"""Health of the engine: heartbeat, stalls, memory pressure, estimated waiting time."""
