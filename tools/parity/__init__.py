"""Models saved by transformers: this runner gives the same log probabilities, or refuses."""
