"""Free memory of this machine: system, control groups and devices."""
