"""Instructions to learn from: prompts with a completion, conversations and texts."""
