"""Constraints: compilation with llguidance, and the position of each text in its grammar.

llguidance is imported late, by the first constraint: the server works without it.
"""
