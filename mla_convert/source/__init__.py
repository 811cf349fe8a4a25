"""The source checkpoint: where it is, its configuration, families, tokenizer, weights and texts."""
