"""Loading: from a directory to a model that has been tried."""
