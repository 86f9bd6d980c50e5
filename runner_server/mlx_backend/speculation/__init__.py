"""Proposal of drafts by a draft model, and the drawing of tokens to check them."""
