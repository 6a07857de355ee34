"""Rows against what the chat template and the tokenizer make of them."""
