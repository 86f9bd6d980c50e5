"""Memory needs of runners, and memory reservations on this machine."""
