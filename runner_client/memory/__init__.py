"""Memory of a runner: the estimate, and the gate that admits it."""
