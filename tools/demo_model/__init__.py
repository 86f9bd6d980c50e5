"""Training of the demo model: corpus, training loop and output files."""
