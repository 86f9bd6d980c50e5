"""Conversations: their messages in the protocol, and the answers to them."""
