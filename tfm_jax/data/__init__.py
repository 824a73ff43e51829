"""Text in, batches of tokens out: sources, tokenizers, the offline token builder and step-addressed reading."""
