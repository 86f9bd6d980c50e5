"""Runners as child processes: spawn, supervise, call, stop."""
