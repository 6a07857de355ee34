"""Generation of text in ways that `generate` of transformers does not have."""
