"""Ollama's HTTP interface."""
