"""LoRA adapters: several beside one model, each row of a batch with its own."""
