"""Memory of a runner: estimates, and the gate for new runners."""
