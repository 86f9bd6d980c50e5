"""Tokenizers, read from ``tokenizer.json`` or with transformers."""
