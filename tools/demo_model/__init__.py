"""Training of the demo model: the corpus, the training loop and the files it writes."""
