"""Drives one real runner at twice its capacity for half an hour, and judges what it saw.

``python -m soak --help`` says how; docs/reliability.md says what is checked, and what was seen.
"""
