"""Free memory of this machine, its control groups and its devices."""
