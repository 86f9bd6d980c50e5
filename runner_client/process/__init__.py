"""Runners as child processes: spawn, supervise, call and stop."""
