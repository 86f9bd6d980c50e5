"""Drafts of the next tokens of a row, which one step of the model checks together."""
