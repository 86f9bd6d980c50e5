"""Conversations: a model's chat format, and templates rendered in a process of their own."""
