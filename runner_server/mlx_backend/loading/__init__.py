"""Loading of models, from a directory to a tested model in memory."""
