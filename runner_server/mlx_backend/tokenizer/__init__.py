"""Tokenizers, read from `tokenizer.json` or by transformers."""
