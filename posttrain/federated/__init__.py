"""Federated training of one LoRA: clients train on rows of their own, a server averages what they send back."""
