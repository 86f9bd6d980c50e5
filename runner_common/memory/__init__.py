"""Memory needs of runners and reservations on this machine."""
