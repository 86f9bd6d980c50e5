"""Download of models from the Hugging Face hub into the local cache, after an estimate.

Only the modules of this room import huggingface_hub, which the base install does not include.
"""
