"""The memory that runners need, and what they reserve of the machine."""
