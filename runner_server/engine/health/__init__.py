"""Signs that the engine works: heartbeat, stalls, memory pressure, waiting time."""
